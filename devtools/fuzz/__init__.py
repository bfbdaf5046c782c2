"""Bad files and hostile workflows by the hundred thousand: `python3 dev.py fuzz`.

| file | does |
|---|---|
| `targets` | a class for each reader: honest inputs, their mutations, the call, what it may raise |
| `mutations.py`, `gguf_fields.py` | damage to bytes, JSON, texts, fields of a GGUF header |
| `guard.py` | what must hold while an input is read |
| `worker.py` | targets in their own process: by Atheris, by Hypothesis, or replayed from files |
| `__main__.py` | starts the children, says what ended them, minimises findings, writes the table |

A finding is a small file in `tests/fuzz/corpus/TARGET`, which every test run reads again.
"""
