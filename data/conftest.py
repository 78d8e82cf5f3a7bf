"""A fixture for all tests in this folder."""

import sys

import pytest

from data import terminal


@pytest.fixture
def call(monkeypatch, capsys):
    """A function that runs a script with a command line, in this process, and expects an exit status. It
    returns what was printed: by a success to stdout, by a failure to stderr."""

    def call(script, *words, status=0):
        monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, words)])
        code = 0
        try:
            terminal.run(script.main)
        except SystemExit as stop:
            code = stop.code
        out, call.err = capsys.readouterr()
        assert code == status and "Traceback" not in call.err, call.err
        return call.err if status else out

    return call
