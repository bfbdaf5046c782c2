"""Measures a model by the images that its user generates anyway: without runs of its own."""
import logging
from collections.abc import Callable
from typing import Any

import comfy.model_management
import torch
from comfy.patcher_extension import WrappersMP

from ....ops.log import PREFIX
from ....ops.quantize.second_moments import HELD_OUT, STEP
from ...container.weight_file import first_line
from ...progress import Progress
from ...refusals.foreign_weights import COMPILED, reject_foreign_weights
from .measure import measurement_of
from .moment_collector import Collector, linear_layers, moment_bytes
from .sensitivity import FAST, Sensitivity

KEY = "featherweight_measurement"  # of the wrappers
MEASURED_CALLS = 0.25  # of the model's calls, spread over the noise levels of all images
MOST_TOKENS = 1024  # of each layer's inputs in one of them, evenly spaced
MAIN_SHARE = 0.5  # of the free main memory, where the moments lie


class WhileGenerating:
    """Collects moments in a sampler's own calls of a model.

    They lie in main memory; a layer's are on its device only while it adds to them. The measurement
    is saved after 1, 2, 4, 8 ... images, each time of all of them. Of the calls between two times
    the last quarter is held out, but none of a first image alone, whose steps are too alike: so its
    measurement is not used. An error ends it and is logged; the image is generated all the same.

    Args:
        save: writes a measurement.
    """

    def __init__(self, save: Callable[[Sensitivity], object]):
        self.save = save
        self.images = 0
        self._calls = self._measured = 0  # of the model
        self._last_save, self._next_save = 0, 1  # images
        self._sampling: tuple[torch.Tensor, int] | None = None  # noise levels and images
        self._holds_out = False
        self._is_stopped = False
        self._collector: Collector | None = None

    def attach(self, patcher):
        """Returns a clone of a ModelPatcher whose sampling is measured.

        Raises:
            WeightFileError: where only another pack can read the model's weights.
        """
        reject_foreign_weights(patcher.model)
        clone = patcher.clone()
        clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, self._sample)
        clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, self._call)
        return clone

    def _sample(self, sample, noise, latent_image, sampler, sigmas, *args, **kwargs):
        patcher = sample.class_obj.model_patcher
        collector = self._collector_for(patcher)
        if collector is None:
            return sample(noise, latent_image, sampler, sigmas, *args, **kwargs)
        images = 1 if noise.is_nested else len(noise)
        self._sampling = sigmas[:-1], images
        with collector:
            result = sample(noise, latent_image, sampler, sigmas, *args, **kwargs)
        self.images += images
        if self.images >= self._next_save and not self._is_stopped:
            self._last_save, self._next_save = self.images, 1 << self.images.bit_length()
            try:
                about = {"samples": self.images, "steps": self._measured // self.images,
                         "thoroughness": FAST}
                progress = Progress("measuring the layers")
                self.save(measurement_of(patcher, collector, progress, about))
            except Exception as error:
                self._stop(f"the measurement was not saved: {error}")
        return result

    def _collector_for(self, patcher) -> Collector | None:
        """Returns the collector for a model's layers, None where nothing is measured."""
        if self._is_stopped:
            return None
        if patcher.model_options.get(COMPILED):
            self._stop("nothing is measured: torch.compile hides the layers' inputs")
            return None
        layers = linear_layers(patcher.model)
        if self._collector is None:
            collector = Collector(
                layers, most_tokens=MOST_TOKENS, on_device=False, on_error=lambda error:
                self._stop(f"the measurement ends here: {first_line(error)}"))
            columns = [layer.in_features for layer in layers.values()]
            needed = moment_bytes(columns, collector.block)
            free: Any = comfy.model_management.get_free_memory(torch.device("cpu"))
            if needed > MAIN_SHARE * free:
                self._stop(f"nothing is measured: it takes up to {needed / 1e9:.1f} GB of main"
                           f" memory, of which {free / 1e9:.1f} GB are free")
                return None
            self._collector = collector
        self._collector.layers = layers
        return self._collector

    def _stop(self, why: str):
        logging.warning("%sMeasure Sensitivity: %s", PREFIX, why)
        self._is_stopped, self._collector = True, None

    def _call(self, apply_model, x, sigma, *args, **kwargs):
        collector = self._collector
        if collector is not None and self._sampling is not None:
            hold_out = self._is_in_last_quarter(float(sigma.max()), *self._sampling)
            is_first = hold_out and not self._holds_out
            collector.is_paused = not is_first and self._calls * STEP % 1 >= MEASURED_CALLS
            if not collector.is_paused:
                collector.next_call(hold_out)
                self._measured += 1
            self._holds_out = hold_out
            self._calls += 1
        return apply_model(x, sigma, *args, **kwargs)

    def _is_in_last_quarter(self, sigma: float, sigmas: torch.Tensor, images: int) -> bool:
        """Returns whether a step ends in the last quarter of what is generated between two saves.

        Args:
            sigma: noise level of the call.
            sigmas: of the sampler's steps, falling.
            images: that it generates.
        """
        if self.images + images == 1:
            return False
        begun = int((sigmas >= sigma * (1 - 1e-4)).sum())  # steps, with this one
        done = self.images - self._last_save
        whole = max(self._next_save - self._last_save, done + images)
        return done + images * begun / max(1, len(sigmas)) > (1 - HELD_OUT) * whole
