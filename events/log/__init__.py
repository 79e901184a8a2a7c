"""The log: a JetStream stream a fleet, the only durable state. This package holds the I/O of `events`.

`connection` connects, `stream` creates and checks the stream, `append` writes commits, `group` writes many events at high
rates, `follow` reads them in order.
"""
