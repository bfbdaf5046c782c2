"""LoRAs: read from a file, checked against a model before anything runs, and applied through the host's own patchers."""
from .apply import apply_lora
from .file import load_lora_file
from .fit import check_lora
from .report import LoraReport, report_text

__all__ = ["LoraReport", "apply_lora", "check_lora", "load_lora_file", "report_text"]
