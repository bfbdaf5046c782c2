"""A model saved in one call."""
from collections.abc import Callable

from featherweight.loaders.packing import save as packing
from featherweight.loaders.packing.planning.file_plan import SaveOptions, plan_file


def save(source, path, wanted, calibrate: Callable | None = None, track=None,
         **options) -> packing.Saved:
    """Plan a file and write it. calibrate: makes the calibration once it is planned. options: of
    `SaveOptions`."""
    plan = plan_file(source, path, wanted, SaveOptions(**options))
    calibration = None if calibrate is None else calibrate()
    return packing.save(plan, calibration=calibration,
                        **({} if track is None else {"track": track}))
