"""The trellis: windows of one number, a codebook that is a permutation, and the least-cost path."""

import pytest
import torch
from torch import Tensor

from sixfold import TrellisQuantizer
from sixfold.kernels.encode import Scale
from sixfold.kernels.trellis import reference
from sixfold.kernels.trellis.grid import search_grid
from sixfold.packing import Bits
from sixfold.trellis import (
    STATES,
    TRELLIS_BITS,
    advances,
    codewords,
    pack_path,
    path_bytes,
    starts,
    unpack_path,
    window_bits,
)
from tests.memory import peak_allocation
from tests.vectors import gaussian

CASES = [(dim, bits) for dim in (11, 15, 32, 100, 128) for bits in TRELLIS_BITS]


def random_rows(n: int, dim: int, bits: Bits, seed: int) -> tuple[list[int], Tensor]:
    """Numbers N of as many bits as a vector has, and their bytes."""
    total, random = starts(dim, bits)[-1], torch.Generator().manual_seed(seed)
    drawn = torch.randint(2, (n, total), generator=random).tolist()
    numbers = [sum(bit << place for place, bit in enumerate(row)) for row in drawn]
    rows = [list(number.to_bytes(path_bytes(dim, bits), "little")) for number in numbers]
    return numbers, torch.tensor(rows, dtype=torch.uint8)


@pytest.mark.parametrize("states", STATES)
@pytest.mark.parametrize(("dim", "bits"), CASES)
def test_states_are_windows_of_a_cyclic_number(dim: int, bits: Bits, states: int) -> None:
    numbers, rows = random_rows(5, dim, bits, seed=dim)
    start = starts(dim, bits)
    expected = [
        [((number | number << start[-1]) >> at) % states for at in start[:-1]] for number in numbers
    ]
    path = unpack_path(rows, dim, bits, states)
    assert path.tolist() == expected
    assert torch.equal(pack_path(path, bits), rows)


def test_half_bits_advance_by_two_and_three() -> None:
    assert advances(6, 2.5) == (2, 3, 2, 3, 2, 3)
    assert starts(5, 2.5) == (0, 2, 5, 7, 10, 12)


@pytest.mark.parametrize("bits", TRELLIS_BITS)
@pytest.mark.parametrize("states", STATES)
def test_codewords_are_evenly_spaced_quantiles(states: int, bits: Bits) -> None:
    book = codewords(states, bits).double()
    assert torch.equal(book, -book.flip(0)), "complementing all bits must negate"
    spread = book.max() / torch.special.ndtri(torch.tensor(1 - 0.5 / states, dtype=torch.float64))
    ranks = torch.special.ndtr(book / spread) * states - 0.5
    torch.testing.assert_close(
        ranks.sort().values, torch.arange(states).double(), rtol=0, atol=1e-3
    )
    # What follows one state: ranks a fixed step apart, so that one is near wherever x lies.
    followers = ranks.view(1 << int(bits), -1).sort(0).values
    step = torch.full_like(followers[1:], states >> int(bits))
    torch.testing.assert_close(followers.diff(dim=0), step, rtol=0, atol=2e-3)


def cheapest(costs: Tensor, bits: Bits, seam: int) -> int:
    """The least of all cyclic numbers that begin with `seam`; costs [dim, states]."""
    dim, states = costs.shape
    total = starts(dim, bits)[-1]
    numbers = torch.arange(1 << total)
    shared = window_bits(states) - advances(dim, bits)[-1]
    numbers = numbers[numbers % (1 << shared) == seam]
    doubled = numbers | numbers << total
    path = torch.stack([(doubled >> at) % states for at in starts(dim, bits)[:-1]])
    return int(costs.gather(1, path).sum(0).min())


@pytest.mark.parametrize("states", [128, 256])
@pytest.mark.parametrize(("dim", "bits"), [(5, 2), (8, 2), (6, 2.5), (4, 4), (5, 3), (14, 1)])
def test_the_path_is_the_best_one_through_its_seam(dim: int, bits: Bits, states: int) -> None:
    book = codewords(states, bits)
    grid = search_grid(book, bits)
    u = gaussian(24, dim, seed=3)
    costs = grid.costs(grid.places(u)[..., None], grid.words)
    paths = reference.search(u, book, bits)
    assert torch.equal(unpack_path(pack_path(paths, bits), dim, bits, states), paths), "not cyclic"
    shared = states >> advances(dim, bits)[-1]
    best = [cheapest(x, bits, int(path[0]) % shared) for x, path in zip(costs, paths, strict=True)]
    found = costs.gather(2, paths[..., None].long()).sum((1, 2)).tolist()
    # Sums that stop growing tell paths no longer apart.
    told = [(one, other) for one, other in zip(found, best, strict=True) if other < grid.most]
    assert len(told) > 12
    assert all(one == other for one, other in told)


def test_of_equal_costs_the_lowest_state_is_taken() -> None:
    """Every state costs the same, so that every decision is a tie."""
    for bits in TRELLIS_BITS:
        paths = reference.search(gaussian(3, 20, seed=1), torch.zeros(128), bits)
        assert (paths == 0).all()


def test_the_seam_is_well_chosen() -> None:
    """The best of all 64 seams gains little; a fixed one would lose much."""
    u, book = gaussian(64, 32, seed=4), codewords(256, 2)
    found = (u - book[reference.search(u, book, 2)]).square().sum()
    grid, errors = search_grid(book, 2), []
    for seam in range(64):
        bits = torch.full((len(u),), seam)
        places = grid.places(u).mT.contiguous()
        path = reference._viterbi(places, grid, advances(32, 2), before=2, seam=bits)
        errors.append((u - book[path.mT]).square().sum(1))
    assert found < 1.03 * torch.stack(errors).amin(0).sum()
    assert errors[0].sum() > 1.2 * found


@pytest.mark.parametrize("states", [128, 256])
@pytest.mark.parametrize("bits", TRELLIS_BITS)
@pytest.mark.parametrize("dim", [64, 128])
def test_whole_numbers_lose_next_to_nothing(dim: int, bits: Bits, states: int) -> None:
    """At most a hundredth more than the same search in float32, and no single vector much more."""
    book = codewords(states, bits)
    u = gaussian(1024, dim, seed=dim)
    found, best = (
        (u - book[search(u, book, bits)]).square().mean(1) for search in (reference.search, exact)
    )
    assert found.mean() < 1.01 * best.mean()
    assert (found - best).max() < 0.15


def exact(u: Tensor, book: Tensor, bits: Bits) -> Tensor:
    """`reference.search` with squared differences as they are."""
    dim, states, widths = u.shape[1], len(book), advances(u.shape[1], bits)
    margin = reference.seam_margin(states, bits)
    around = [t % dim for t in range(-margin, margin)]

    def least(steps: list[int], seam: Tensor | None) -> Tensor:
        kept = torch.zeros(states >> widths[steps[0] - 1], len(u))
        if seam is not None:
            kept.fill_(torch.inf).scatter_(0, seam[None], 0)
        decisions = []
        for t in steps:
            cost = (u[:, t] - book[:, None]).square().view(-1, *kept.shape) + kept
            kept, left = cost.view(states >> widths[t], -1, len(u)).min(1)
            decisions.append(left)
        state, path = kept.argmin(0) if seam is None else seam, []
        for t, left in zip(reversed(steps), reversed(decisions), strict=True):
            path.append(state << widths[t] | left.gather(0, state[None])[0])
            state = path[-1] & ((states >> widths[t - 1]) - 1)
        return torch.stack(path[::-1])

    seam = least(around, None)[margin] & ((states >> widths[-1]) - 1)
    return least([*range(dim)], seam).mT


@pytest.mark.parametrize("bits", TRELLIS_BITS)
def test_more_states_lose_less(bits: Bits) -> None:
    x = gaussian(100, 128, seed=5)
    errors = []
    for states in STATES:
        quantizer = TrellisQuantizer(128, bits, states)
        errors.append((x - quantizer.decode(quantizer.encode(x))).square().sum().item())
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("bits", TRELLIS_BITS)
def test_the_unbiased_scale_keeps_the_product_with_the_vector(bits: Bits) -> None:
    quantizer = TrellisQuantizer(40, bits, scale="unbiased")
    x = gaussian(30, 40, seed=8)
    decoded = quantizer.decode(quantizer.encode(x))
    torch.testing.assert_close((x * decoded).sum(1), x.square().sum(1), rtol=1e-3, atol=0)


@pytest.mark.parametrize("scale", ["optimal", "unbiased"])
def test_a_path_that_points_away_gets_no_negative_scale(scale: Scale) -> None:
    """One window is all that 8 bits are: some vectors find no path on their side."""
    quantizer = TrellisQuantizer(8, 1, scale=scale)
    x = gaussian(4000, 8, seed=9)
    codes = quantizer.encode(x)
    assert (codes.scales >= 0).all()
    if scale == "optimal":
        assert (quantizer.decode(codes).norm(dim=1) <= 1.001 * x.norm(dim=1)).all()


def test_scores_read_codes_in_tiles() -> None:
    quantizer = TrellisQuantizer(64, 2)
    codes = quantizer.encode(gaussian(64, 64, seed=6))[torch.arange(64).repeat(1024)]
    queries = gaussian(1, 64, seed=7)
    quantizer.scores(queries, codes[:8])
    in_full = 4 * codes.shape.numel()
    assert peak_allocation(lambda: quantizer.scores(queries, codes)) < in_full
