"""What can happen in a fleet, and the log that it is written to.

`types` are the events, `codec` turns a commit into bytes and back, `subjects` says where a commit belongs, `hashing`
turns tokens into block hashes. All four are pure. `log` holds the I/O: the stream, appending and following.
"""
