"""HTTP/1.1 as a proxy needs it: strict readers without I/O, a server, and connections to engines."""
