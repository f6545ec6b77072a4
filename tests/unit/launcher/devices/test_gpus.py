"""`--gpus` from its grammar to devices: what is there, what is free, who holds the rest. Nothing is asked of a machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.devices import holders as module
from launcher.devices.devices import Device, Selection, expand_ids, join_devices, parse_gpus
from launcher.devices.holders import EVERY, NOBODY, GpuHolder, Occupancy, holders_of
from launcher.devices.inventory import Gpu, MigSlice
from starling.core.errors import UsageError
from starling.core.units import GIB

GPUS = tuple(Gpu(n, f"GPU-0000-{n}", "H200", 140 * GIB) for n in range(6))
SLICES = tuple(MigSlice(n, f"MIG-0000-{n}", "MIG 1g.18gb", 18 * GIB) for n in (0, 2))
MIXED = (*GPUS[:2], replace(GPUS[2], mig=True, slices=SLICES))
"""Two whole GPUs, and one in two slices."""


def choose_gpus(
    text: str, gpus: Sequence[Gpu] | None, occupancy: Occupancy = NOBODY, *, force: bool = False
) -> tuple[tuple[Device, ...], list[str]]:
    """Choose as `up` does: what others hold is refused, unless --force shares it, which is noted."""
    choice = module.choose_gpus(text, gpus, occupancy)
    if force:
        return choice.devices, choice.shared_notes()
    choice.check_free(text, gpus, occupancy)
    return choice.devices, []


def ids(text: str, gpus: tuple[Gpu, ...] | None = GPUS, occupancy: Occupancy = NOBODY) -> list[str]:
    devices, _ = choose_gpus(text, gpus, occupancy)
    return [device.id for device in devices]


def held(*held: tuple[str, ...], own: tuple[str, ...] = ()) -> Occupancy:
    return Occupancy(tuple(GpuHolder(f"holder {n}", gpus) for n, gpus in enumerate(held)), own)


# --- grammar -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "selection"),
    [
        ("3", Selection("ids", ("3",))),
        ("1-5", Selection("ids", ("1", "2", "3", "4", "5"))),
        ("0,2-4", Selection("ids", ("0", "2", "3", "4"))),
        (" 0 , 02 ", Selection("ids", ("0", "2"))),
        ("GPU-8f6a2b3c-1111-2222-3333-444455556666", Selection("ids", ("GPU-8f6a2b3c-1111-2222-3333-444455556666",))),
        ("MIG-8f6a2b3c-1111,2:00", Selection("ids", ("MIG-8f6a2b3c-1111", "2:0"))),
        ("MIG-GPU-8f6a2b3c-1111/1/0", Selection("ids", ("MIG-GPU-8f6a2b3c-1111/1/0",))),
        ("all", Selection("all")),
        ("Free", Selection("free")),
        ("free:3", Selection("free", count=3)),
    ],
)  # fmt: skip
def test_gpu_lists_mean_what_they_say(text: str, selection: Selection) -> None:
    assert parse_gpus(text) == selection


@pytest.mark.parametrize(
    "text", ["", "x", "1-", "-1", "5-1", "1,,2", "1,1", "1-3,2", "0-99999", "1.5", "²", "GPU-", "free:0", "free:", "free:-1",
             "free:9999", "1:", ":1", "1:2:3", "3,3:0", "2:1,2:1"]
)  # fmt: skip
def test_a_wrong_gpu_list_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--gpus"):
        parse_gpus(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("5-1", "5-1 runs backwards; write 1-5"),
        ("all,3", "'all' cannot be combined"),
        ("free:2,3", "'free:2' cannot be combined"),
        ("3,3:0", "names GPU 3 and its slice 3:0"),
        ("1-3,2", "names 2 twice"),
        ("free:0", "must ask for 1 to 256"),
    ],
)
def test_what_is_wrong_is_said_in_a_gpu_lists_own_words(text: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_gpus(text)
    assert words in str(caught.value)
    assert caught.value.exit_code == 2


@given(st.text(max_size=30) | st.from_regex(r"[0-9a-z:,-]{0,12}"))
def test_any_text_is_a_gpu_list_or_our_own_error(text: str) -> None:
    try:
        selection = parse_gpus(text)
    except UsageError:
        return
    assert all(selection.ids)
    assert len(set(selection.ids)) == len(selection.ids)


# --- what is there -------------------------------------------------------------------------------------------


def test_devices_are_known_by_number_and_carry_their_uuid() -> None:
    [device], _ = choose_gpus("GPU-0000-4", GPUS)
    assert device == Device("gpu", "4", ("GPU-0000-4",))
    assert (device.label, device.slug, device.handles) == ("gpu:4", "gpu4", ("GPU-0000-4",))


def test_a_gpu_that_is_not_there_is_named_with_those_that_are() -> None:
    with pytest.raises(UsageError, match=r"no GPU 6 .*0 \(H200\)"):
        choose_gpus("1-6", GPUS)
    with pytest.raises(
        UsageError, match=r"no MIG slice MIG-9999-9 .*2 \(H200; slices 2:0 \(MIG 1g.18gb, MIG-0000-0\)"
    ):
        choose_gpus("MIG-9999-9", MIXED)
    with pytest.raises(UsageError, match="no MIG slice 2:1 on this machine"):
        choose_gpus("2:1", MIXED)


def test_one_gpu_by_index_and_uuid_is_one_gpu() -> None:
    for text in ("4,GPU-0000-4", "2:0,MIG-0000-0"):
        with pytest.raises(UsageError, match="by index and by UUID"):
            choose_gpus(text, GPUS[4:] if text[0] == "4" else MIXED)


def test_where_nvml_is_silent_ids_stand_as_given() -> None:
    assert choose_gpus("1-2", None)[0] == (Device("gpu", "1"), Device("gpu", "2"))
    for text in ("all", "free", "free:2"):
        with pytest.raises(UsageError, match=f"--gpus {text}: .*cannot be counted"):
            choose_gpus(text, None)
        with pytest.raises(UsageError, match="this machine has no GPU; use --cpu N"):
            choose_gpus(text, ())


def test_a_slice_is_a_device_of_its_own_by_number_or_id() -> None:
    for text in ("2:2", "MIG-0000-2"):
        [device], _ = choose_gpus(text, MIXED)
        assert device == Device("gpu", "2:2", ("MIG-0000-2",))
        assert device.slug == "gpu2-mig2"
    assert ids("all", MIXED) == ["0", "1", "2:0", "2:2"]


def test_a_gpu_in_mig_mode_is_not_taken_whole_and_its_slices_are_listed() -> None:
    for text in ("2", "GPU-0000-2"):
        with pytest.raises(UsageError, match=r"never whole; name its slices: 2:0 \(.*MIG-0000-0\), 2:2"):
            choose_gpus(text, MIXED)
    without = (*GPUS[:2], replace(GPUS[2], mig=True))
    for text in ("2", "all"):
        with pytest.raises(UsageError, match=r"GPU 2 is in MIG mode.*-cgi"):
            choose_gpus(text, without)
    assert ids("free", without) == ["0", "1"]


def test_a_broken_gpu_is_refused_by_name_and_passed_over_by_free() -> None:
    gpus = (GPUS[0], Gpu(1, "", "", 0, problem="GPU is lost"))
    for text in ("1", "all"):
        with pytest.raises(UsageError, match=r"GPU 1 cannot be used \(GPU is lost\)"):
            choose_gpus(text, gpus)
    with pytest.raises(UsageError, match=r"--gpus free: GPU 1 cannot be used"):
        choose_gpus("free", gpus[1:])
    assert ids("free", gpus) == ["0"]
    assert ids("0", gpus) == ["0"]


# --- who holds what ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "gpus", "covers"),
    [
        ("3", ("3",), True),
        ("3", ("GPU-0000-3",), True),
        ("3", (EVERY,), True),
        ("3", ("30", "GPU-0000-4"), False),
        ("3", (), False),
    ],
)
def test_a_holder_has_a_gpu_by_number_by_uuid_or_as_all(
    text: str, gpus: tuple[str, ...], covers: bool
) -> None:
    [device], _ = choose_gpus(text, GPUS)
    assert bool(holders_of(device, GPUS, [GpuHolder("x", gpus)])) == covers
    assert bool(holders_of(Device("gpu", text), None, [GpuHolder("x", gpus)])) == (
        covers and gpus[0] != "GPU-0000-3"
    )


@pytest.mark.parametrize(
    ("gpus", "covers"),
    [(("2",), True), (("GPU-0000-2",), True), (("2:0",), True), (("MIG-0000-0",), True), (("2:2",), False)],
)
def test_a_slice_is_held_with_its_gpu_and_not_with_its_sibling(gpus: tuple[str, ...], covers: bool) -> None:
    [device], _ = choose_gpus("2:0", MIXED)
    assert bool(holders_of(device, MIXED, [GpuHolder("x", gpus)])) == covers


def test_a_busy_gpu_is_refused_naming_its_holder_the_remedy_and_what_is_free() -> None:
    holder = GpuHolder("x-y-gpu2 of fleet x/y", ("GPU-0000-2",), "1", "launcher stop x/y")
    with pytest.raises(UsageError) as caught:
        choose_gpus("1-3", GPUS, Occupancy((holder,)))
    assert str(caught.value) == (
        "--gpus 1-3: GPU 2 is held by x-y-gpu2 of fleet x/y; choose others (free: 0-1,3-5), "
        "end what holds it: launcher stop x/y, or share with --force"
    )


def test_several_busy_gpus_are_a_line_each() -> None:
    with pytest.raises(UsageError) as caught:
        choose_gpus("all", GPUS[:2], held((EVERY,), ("1",)))
    assert str(caught.value).splitlines() == [
        "--gpus all: 2 devices are held",
        "  GPU 0 is held by holder 0",
        "  GPU 1 is held by holder 0 and holder 1",
        "choose others, or wait, or share with --force",
    ]


def test_force_shares_and_says_with_whom() -> None:
    devices, notes = choose_gpus("1-2", GPUS, held(("2",)), force=True)
    assert [device.id for device in devices] == ["1", "2"]
    assert notes == ["GPU 2 is held by holder 0; shared as --force says"]


def test_a_container_and_the_process_in_it_are_one_holder() -> None:
    both = (GpuHolder("container a", ("2",), "a"), GpuHolder("container a", ("GPU-0000-2",), "a"))
    with pytest.raises(UsageError, match="GPU 2 is held by container a;"):
        choose_gpus("2", GPUS, Occupancy(both))


# --- free ----------------------------------------------------------------------------------------------------


def test_free_takes_what_nobody_holds_in_order() -> None:
    taken = held(("1",), ("GPU-0000-3",))
    assert ids("free", GPUS, taken) == ["0", "2", "4", "5"]
    assert ids("free:3", GPUS, taken) == ["0", "2", "4"]
    assert ids("free", MIXED, held(("2:0",), ("0",))) == ["1", "2:2"]


@given(
    st.lists(st.sampled_from(["0", "1", "2:0", "GPU-0000-2", "MIG-0000-2", "7"]), max_size=4),
    st.none() | st.integers(1, 4),
)
def test_free_never_takes_what_is_held_and_misses_nothing(held_ids: list[str], count: int | None) -> None:
    found = [GpuHolder("x", (item,)) for item in held_ids]
    free = [device for device in choose_gpus("all", MIXED)[0] if not holders_of(device, MIXED, found)]
    text = "free" if count is None else f"free:{count}"
    if len(free) < (count or 1):
        with pytest.raises(UsageError, match="free"):
            choose_gpus(text, MIXED, Occupancy(tuple(found)))
    else:
        assert list(choose_gpus(text, MIXED, Occupancy(tuple(found)))[0]) == free[:count]


def test_fewer_free_than_asked_names_the_holders() -> None:
    with pytest.raises(UsageError) as caught:
        choose_gpus("free:3", GPUS[:3], held(("1",), ("2",)))
    assert str(caught.value).splitlines() == [
        "--gpus free:3: 1 of 3 are free",
        "  GPU 1 is held by holder 0",
        "  GPU 2 is held by holder 1",
        "wait, or take --gpus free:1",
    ]
    with pytest.raises(
        UsageError, match=r"--gpus free: none is free\n  GPU 0 is held by holder 0\nwait for one"
    ):
        choose_gpus("free", GPUS[:1], held((EVERY,)))


@pytest.mark.parametrize("own", [("GPU-0000-1", "GPU-0000-4"), ("1", "4")])
def test_free_is_what_the_fleet_has_already_when_it_exists(own: tuple[str, ...]) -> None:
    assert ids("free", GPUS, held(("0",), own=own)) == ["1", "4"]
    assert ids("free:2", GPUS, held(("0",), own=own)) == ["1", "4"]
    assert ids("free:3", GPUS, held(("0",), own=own)) == ["1", "2", "4"]
    assert ids("free:1", GPUS, held(("0",), own=own)) == ["1"]


def test_a_fleets_own_gpu_that_somebody_took_meanwhile_is_refused_not_replaced() -> None:
    with pytest.raises(UsageError, match="GPU 4 is held by holder 0"):
        choose_gpus("free", GPUS, held(("4",), own=("1", "4")))


def test_a_gpu_on_which_the_fleet_runs_already_is_not_refused_for_a_guest() -> None:
    guest = GpuHolder("guest", ("1",))
    assert ids("1-2", GPUS, Occupancy((guest,), own=("1", "2"), settled=("GPU-0000-1", "2"))) == ["1", "2"]
    with pytest.raises(UsageError, match="GPU 1 is held by guest"):
        choose_gpus("1-2", GPUS, Occupancy((guest,), own=("1", "2"), settled=("2",)))


# --- several in one ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "label", "slug"),
    [("0-3", "gpu:0-3", "gpu0-3"), ("4,0,2-3", "gpu:0,2-4", "gpu0_2-4"), ("0,5", "gpu:0,5", "gpu0_5")],
)
def test_several_devices_join_into_one_with_a_short_name(text: str, label: str, slug: str) -> None:
    devices, _ = choose_gpus(text, GPUS)
    joined = join_devices(devices)
    assert (joined.label, joined.slug) == (label, slug)
    assert joined.handles == tuple(f"GPU-0000-{number}" for number in sorted(device.id for device in devices))
    assert joined.members == tuple(sorted(device.id for device in devices))
    assert joined.inside == ",".join(map(str, range(len(devices))))


def test_uuids_that_nobody_can_number_join_too() -> None:
    joined = join_devices(choose_gpus("GPU-8f6a2b3c-1111,GPU-9999", None)[0])
    assert (joined.label, joined.slug) == ("gpu:GPU-8f6a2b3c-1111,GPU-9999", "gpu-8f6a2b3c1111-x2")
    assert joined.handles == ("GPU-8f6a2b3c-1111", "GPU-9999")


@given(st.sets(st.integers(0, 300), min_size=1))
def test_a_joined_devices_id_expands_to_its_members(numbers: set[int]) -> None:
    joined = join_devices([Device("gpu", str(number)) for number in numbers])
    assert expand_ids(joined.id) == tuple(map(str, sorted(numbers)))
