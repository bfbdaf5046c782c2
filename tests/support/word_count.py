"""The words of a page."""
import re


def word_count(text: str) -> int:
    """Returns how many words a page has, without addresses and the lines of tables."""
    return len(re.sub(r"\(https?:[^)]*\)|\|", " ", text).split())
