"""Damaged files and hostile workflows: `tests/fuzz` reads them, and `python3 dev.py fuzz` more.

| file | does |
|---|---|
| `targets` | what is read: well-formed inputs, the call, the errors that it may raise |
| `strategies.py` | Hypothesis strategies that change an input by what it is |
| `guard.py` | what must hold while an input is read |
| `reader.py` | Hypothesis's test of a target, whose inputs a process of its own reads |
"""
