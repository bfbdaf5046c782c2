"""One stage in a process of its own: python -m devtools.gpu.stage NAME [options]. A line that
begins with ROW is a row."""
import argparse
import json
import sys

from devtools.gpu.stages import STAGES

ROW = "ROW "


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=STAGES)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--peer")
    options = parser.parse_args()
    for title, values in STAGES[options.name].rows(options.quick, options.peer):
        print(ROW + json.dumps([title, values]), flush=True)


if __name__ == "__main__":
    sys.exit(main())
