"""The process that confined ones are forked from ends with the one that it works for."""

from __future__ import annotations

from kvplane.services.process.confined import Forkserver


def test_it_ends_though_a_fork_of_this_process_has_its_socket_as_well() -> None:
    server = Forkserver("kvplane.services.history.asked")
    confined = server.start("kvplane.services.history.asked:nothing", memory=1 << 28, cpu=1)
    process, control = server._process, server._control
    assert process is not None
    assert control is not None
    with control.dup():
        confined.close()
        server.close()
        # By itself, and not because it was killed.
        assert process.returncode == 0
