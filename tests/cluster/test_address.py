"""The owner of the machine names the Ray cluster; no value of a workflow can."""
import pytest

from featherweight.cluster.comfyui_install import MachineError
from featherweight.cluster.ray_connection import (
    THE_CLUSTER,
    THIS_COMPUTER,
    address_options,
    check_address,
    is_cluster,
    named_cluster,
)


@pytest.mark.parametrize(("environment", "address"), [
    ({}, ""), ({"RAY_ADDRESS": "head:6379"}, "head:6379"), ({"RAY_ADDRESS": "local"}, ""),
    ({"RAY_ADDRESS": "other:1", "FEATHERWEIGHT_RAY_ADDRESS": " head:6379 "}, "head:6379"),
    ({"RAY_ADDRESS": "other:1", "FEATHERWEIGHT_RAY_ADDRESS": "local"}, "")])
def test_the_owner_names_the_cluster_in_the_environment(environment, address):
    assert named_cluster(environment) == address


def test_the_cluster_is_offered_where_one_is_named():
    assert address_options("") == [THIS_COMPUTER]
    assert address_options("head:6379") == [THIS_COMPUTER, THE_CLUSTER]


@pytest.mark.parametrize("value", ["", " ", THIS_COMPUTER])
@pytest.mark.parametrize("cluster", ["", "auto", "head:6379"])
def test_an_empty_value_of_an_older_workflow_is_this_computer(value, cluster):
    assert not is_cluster(value, cluster)


@pytest.mark.parametrize(
    ("value", "cluster"),
    [
        (THE_CLUSTER, "head:6379"),
        ("head:6379", "head:6379"),
        (" HEAD.:06379 ", "head:6379"),
        ("[::1]:6379", "::1:6379"),
        ("auto", "auto"),
        ("AUTO", "auto"),
    ],
)
def test_the_owners_own_address_is_the_cluster(value, cluster):
    assert is_cluster(value, cluster)


@pytest.mark.parametrize(
    "value",
    [
        "other:6379",
        "head:6380",
        "head",
        "auto",
        "local",
        "ray://head:6379",
        "head:6379,other:6379",
        None,
        5,
        True,
        ["head:6379"],
        {"address": "head:6379"},
        "x" * 100_000,
        "\0",
        "the cluster of somebody",
    ],
)
@pytest.mark.parametrize("cluster", ["", "head:6379"])
def test_every_other_value_is_refused_in_a_sentence_that_says_where_it_belongs(value, cluster):
    with pytest.raises(
            MachineError,
            match="FEATHERWEIGHT_RAY_ADDRESS to its address where ComfyUI is started") as error:
        is_cluster(value, cluster)
    assert len(str(error.value)) < 600 and str(error.value).isprintable()


@pytest.mark.parametrize("address", [
    "head", "head:", ":6379", "head:0", "head:99999", "ray://head:10001", "a b:1", "head:1/../2"])
def test_what_is_no_address_is_refused_before_anything_connects(address):
    with pytest.raises(MachineError, match="is not the address of a Ray cluster: write HOST:6379"):
        check_address(address)


@pytest.mark.parametrize(
    "address", ["auto", "head:6379", "192.168.1.10:6379", "[fe80::1]:6379", "a_b.local:1"]
)
def test_an_address_is_a_host_and_a_port_or_auto(address):
    check_address(address)
