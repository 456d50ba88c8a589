"""`semper`: the program. What its commands are: `cli.program`.

Nothing is imported here before `main` is called: from then on Ctrl-C ends the program without a
traceback, whatever it is doing.
"""

from __future__ import annotations

import signal
import sys
from typing import NoReturn

INTERRUPTED = 128 + signal.SIGINT


def main() -> NoReturn:
    """The entry point: an error of ours becomes one clear line and an exit code; with --output json
    one JSON document on stderr, in the form of the API (`host.http.ErrorView`).
    """
    handler = signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing is begun that could be ended
    from sempervirt.cli import failures, program

    wants_json = failures.wants_json(sys.argv[1:])
    try:
        signal.signal(signal.SIGINT, handler)
        code = program.app(standalone_mode=False)
        if (unwritten := failures.finish()) is not None:
            code = failures.tell(unwritten, as_json=wants_json)
    except failures.TOLD as error:
        code = failures.tell(failures.finish() or error, as_json=wants_json)
    except KeyboardInterrupt:
        code = INTERRUPTED
    finally:
        if handler is not signal.SIG_IGN:  # as nohup has it
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # nor while threads are waited for
    sys.exit(code if isinstance(code, int) else 0)
