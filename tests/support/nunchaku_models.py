"""Small models of the host that Nunchaku's files hold, quantised and dense."""
import functools

import nunchaku_writer as writer
import pytest
from diffusers_names import DIFFUSERS, in_diffusers_names, in_the_hosts_names
from families import FAMILIES, host_patcher, random_weights, shrunken_detection
from pack_api import load_diffusion_model


def table_of(name):
    """Name in diffusers -> the host's."""
    family = FAMILIES[name]
    if name in DIFFUSERS:
        return DIFFUSERS[name](family.config)
    return {key: key for key in random_weights(family)}


def weights_of(name):
    """Weights of a family in diffusers' names."""
    return in_diffusers_names(random_weights(FAMILIES[name]), table_of(name))


def in_host_names(name, values):
    """Values of a family in diffusers' names, in the host's."""
    return in_the_hosts_names(values, random_weights(FAMILIES[name]), table_of(name))


def dense_of(name, values):
    """The host's own model of values in diffusers' names, and these in the host's names."""
    family, weights = FAMILIES[name], in_host_names(name, values)
    with pytest.MonkeyPatch.context() as patch:
        shrunken_detection(family, patch)
        return host_patcher(weights, family), weights


def load(name, path, **options):
    with pytest.MonkeyPatch.context() as patch:
        shrunken_detection(FAMILIES[name], patch)
        return load_diffusion_model(str(path), **options)


@functools.cache
def quantized(name, precision, **options):
    return writer.WRITERS[name](weights_of(name), precision=precision, **options)
