"""The two libraries, loaded where the whole process finds them, and the signatures of their
functions (`source/devices.h`)."""
import ctypes
import os
from ctypes import c_bool, c_int, c_int64, c_size_t, c_uint64, c_void_p
from pathlib import Path

GIB = 1 << 30
DRIVER = {  # name -> result and arguments
    "fake_configure": (None, c_int, c_size_t),
    "fake_set_capacity": (None, c_int, c_size_t),
    "fake_capacity": (c_size_t, c_int),
    "fake_count": (c_int,),
    "fake_current": (c_int,),
    "fake_exchange": (c_int, c_int),
    "fake_used": (c_size_t, c_int),
    "fake_peak": (c_size_t, c_int),
    "fake_reset_peaks": (None,),
    "fake_copied": (c_uint64, c_int, c_int),
    "fake_reset_copied": (None,),
    "fake_pinned": (c_size_t,),
    "fake_refused_pins": (c_uint64,),
    "fake_is_pinned": (c_bool, c_void_p),
    "cuMemHostRegister": (c_int, c_void_p, c_size_t, ctypes.c_uint),
    "cuMemHostUnregister": (c_int, c_void_p),
}
DEVICE = {
    "fake_set_late": (None, c_int),
    "fake_new_stream": (c_int64,),
    "fake_stream": (c_int64, c_int),
    "fake_set_stream": (None, c_int, c_int64),
    "fake_now": (c_uint64, c_int64),
    "fake_finish": (None, c_int64, c_uint64),
    "fake_finish_all": (None,),
}

driver = device = None  # libcuda.so.1 and libfakegpu.so


def _load(path: Path, signatures: dict) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    for name, (result, *arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def _folder() -> Path:
    return Path(os.environ["FAKEGPU_LIBRARIES"])


def load_driver():
    """The driver, with the devices that FAKEGPU asks for: 2x4 are two of 4 GiB."""
    global driver
    driver = _load(_folder() / "libcuda.so.1", DRIVER)
    devices, gib = os.environ["FAKEGPU"].split("x")
    driver.fake_configure(int(devices), int(float(gib) * GIB))


def load_device(torch_init: str):
    """Torch's side. torch_init: path of torch's `__init__.py`, which has not run: torch asks once
    what devices there are."""
    global device
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(Path(torch_init).with_name("lib") / name), mode=ctypes.RTLD_GLOBAL)
    device = _load(_folder() / "libfakegpu.so", DEVICE)
    device.fake_set_late(os.environ.get("FAKEGPU_LATE") == "1")
