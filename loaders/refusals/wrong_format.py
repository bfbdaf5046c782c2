"""Recognises by its first bytes what was saved or picked in place of a weight file."""
import codecs

ARCHIVE = "it is an archive. Unpack it and pick the model file inside."
LFS_POINTER = (
    "it is a git-lfs pointer, text in place of the model. Run `git lfs pull`, or download the model"
    " itself.")
OLD_GGML = "it is in a ggml format older than GGUF. Get the model as GGUF."

# First bytes of a file -> what it is and what to do.
WRONG_FORMATS = {
    b"version https://git-lfs": LFS_POINTER,
    b"\x1f\x8b": ARCHIVE,
    b"7z\xbc\xaf": ARCHIVE,
    b"Rar!": ARCHIVE,
    b"lmgg": OLD_GGML,
    b"fmgg": OLD_GGML,
    b"tjgg": OLD_GGML,
    b"algg": OLD_GGML,
    b"FUGG": "it is a big-endian GGUF file. Get the little-endian version, which is the usual one.",
}


def sniff_wrong_format(head: bytes) -> str:
    """Returns, as a sentence, what a file with these first bytes is, and what to do."""
    for magic, advice in WRONG_FORMATS.items():
        if head.startswith(magic):
            return advice
    if not head.strip(b"\0"):
        return "it begins with zeros, so its download never finished. Download it again."
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if text[:1] == b"<":
        return (
            "it is a web page, not the model; the site may require a login. Download the model"
            " itself.")
    if _is_text(text[:64]):  # not quoted: the person asking may not be allowed to read it
        return "it is a text file. Download the model itself."
    return (
        "it begins with neither 'GGUF' nor the header of a safetensors file. Download it again, or"
        " pick another file.")


def _is_text(head: bytes) -> bool:
    decoder = codecs.getincrementaldecoder("utf-8")()  # `head` may end within a character
    try:
        text = decoder.decode(head)
    except UnicodeDecodeError:
        return False
    return text.translate(dict.fromkeys(map(ord, "\t\r\n"))).isprintable()
