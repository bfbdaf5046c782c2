"""python3 dev.py soak: the real server for hours, driven by two clients that do to it what people
do."""
import devtools.measure  # noqa: F401  the host and the pack, which write the models
