"""One claim of the papers each. Read `study.py`: what a study is, and the one way to run it.

A new one is a frozen dataclass that extends `Study`: its fields are the command's flags; `run` gives rows, by
`work.train` for training runs or by its own measuring; `summary`, `tables` and `figures` say what they come to. A
line in `lab/command_names.py` makes it a command. `runs.py` is one training run, `workers.py` trains several at once
(`--jobs`), `frames.py` and `drawing.py` hold what tables and figures have in common.
"""
