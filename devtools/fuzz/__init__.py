"""Damaged files and hostile workflows by the hundred thousand: `python3 dev.py fuzz`.

| file | does |
|---|---|
| `targets` | what is read: well-formed inputs, the call, the errors that it may raise |
| `strategies.py` | Hypothesis strategies that change an input by what it is |
| `guard.py` | what must hold while an input is read |
| `worker.py` | one target in a process of its own: by Hypothesis, or from files |
| `__main__.py` | starts the workers, keeps the inputs that broke something, writes the table |

Hypothesis makes what breaks something small, and it becomes a file of `tests/fuzz/corpus/TARGET`,
which every test run reads again.
"""
