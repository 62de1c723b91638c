"""An example as its user starts it."""

import runpy
import sys


def printed_by(example, options, monkeypatch, capsys):
    """What an example's file prints with these options."""
    monkeypatch.setattr(sys, "argv", [example.__file__, *options])
    capsys.readouterr()
    runpy.run_path(example.__file__, run_name="__main__")
    return capsys.readouterr().out
