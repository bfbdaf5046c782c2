"""The pack's log: ComfyUI's, with the pack's name before each message."""
import logging

PREFIX = "[Featherweight] "


class _Named(logging.LoggerAdapter):
    def process(self, msg, kwargs):
        return f"{PREFIX}{msg}", kwargs


log = _Named(logging.getLogger(__name__), {})
