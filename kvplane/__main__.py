"""The command `kvplane`, and `python -m kvplane` for starting it without knowing where it is installed.

Nothing is imported at first: until the command begins, Ctrl-C ends the process as it ends any other, without Python's account
of which import it was in.
"""

import _signal  # type: ignore[import-not-found]

if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)


def entry() -> None:
    """Entry point of the console script."""
    _signal.pthread_sigmask(_signal.SIG_UNBLOCK, {_signal.SIGINT})
    from kvplane.services.cli import main  # noqa: PLC0415 - see above

    main()


if __name__ == "__main__":
    entry()
