"""What people pick or save in the place of a weight file, told by its first bytes."""
from .container import shown

ARCHIVE = "it is an archive. Unpack it and pick the model file inside."
CHECKPOINT = (
    "it is a torch checkpoint (.pt, .pth, .ckpt, .bin) or a zip archive. Unpack it if it is an archive; otherwise "
    "use a ComfyUI loader, or get the model as GGUF."
)
LFS_POINTER = "it is a git-lfs pointer, text in place of the model. Run `git lfs pull`, or download the model itself."
OLD_GGML = "it is in a ggml format older than GGUF. Get the model as GGUF."

# First bytes of what people save under a model's name, and what to do about it.
MISTAKES = {
    b"version https://git-lfs": LFS_POINTER,
    b"PK\x03\x04": CHECKPOINT,
    b"\x80\x02": CHECKPOINT,
    b"\x80\x03": CHECKPOINT,
    b"\x80\x04": CHECKPOINT,
    b"\x80\x05": CHECKPOINT,
    b"\x1f\x8b": ARCHIVE,
    b"7z\xbc\xaf": ARCHIVE,
    b"Rar!": ARCHIVE,
    b"lmgg": OLD_GGML,
    b"fmgg": OLD_GGML,
    b"tjgg": OLD_GGML,
    b"algg": OLD_GGML,
    b"FUGG": "it is a big-endian GGUF file. Get the little-endian version, which is the usual one.",
}


def mistaken_for(head: bytes) -> str:
    """What a file with these first bytes is in place of a weight file, and what to do about it."""
    for magic, advice in MISTAKES.items():
        if head.startswith(magic):
            return advice
    if not head.strip(b"\0"):
        return "it begins with zeros, so its download never finished. Download it again."
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if text[:1] == b"<":
        return "it is a web page, not the model; the site may want you to log in first. Download the model itself."
    if text[:64].isascii() and text[:64].decode("latin-1").replace("\n", " ").isprintable():
        return f"it is a text that begins with {shown(text[:60].decode('ascii'))}. Download the model itself."
    return (f"it begins with the bytes {head[:8].hex(' ')} instead of 'GGUF' or the header of a safetensors file. Download it"
            f" again, or pick another file.")
