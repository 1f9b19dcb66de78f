"""The counter-based generator against numpy's, by way of a textbook version that serves both word
sizes, and published answers."""

import numpy as np
import torch
from pagewire.worker.step.philox import philox, uniform
from scipy import stats

CONSTANTS = {
    32: (0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85),
    64: (0xD2E7470EE14C6C93, 0xCA5A826395121157, 0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B),
}
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def textbook(counter, key, bits):
    m0, m1, w0, w1 = CONSTANTS[bits]
    mask, (a, b, c, d), (k0, k1) = 2**bits - 1, counter, key
    for _ in range(10):
        p, q = m0 * a, m1 * c
        a, b, c, d = (q >> bits) ^ b ^ k0, q & mask, (p >> bits) ^ d ^ k1, p & mask
        k0, k1 = (k0 + w0) & mask, (k1 + w1) & mask
    return a, b, c, d


def words(rows):
    return tuple(torch.tensor(column) for column in zip(*rows, strict=True))


def test_textbook_version_is_numpys():
    generator = np.random.Philox(
        key=np.array([123, 456], np.uint64), counter=np.array([7, 0, 2, 0], np.uint64)
    )
    assert tuple(int(x) for x in generator.random_raw(4)) == textbook((8, 0, 2, 0), (123, 456), 64)


def test_ours_equals_the_textbook_and_the_published_answers():
    random = np.random.default_rng(0)
    counters = random.integers(0, 2**32, (500, 4)).tolist() + [list(c) for c, _, _ in KNOWN]
    keys = random.integers(0, 2**32, (500, 2)).tolist() + [list(k) for _, k, _ in KNOWN]
    ours = torch.stack(philox(words(counters), words(keys)), 1).tolist()
    assert ours == [list(textbook(c, k, 32)) for c, k in zip(counters, keys, strict=True)]
    assert [tuple(row) for row in ours[500:]] == [answer for _, _, answer in KNOWN]


def test_uniform_is_uniform_and_a_function_of_its_row():
    seeds, positions = torch.full((20_000,), 2**62 + 11), torch.arange(20_000)
    values = uniform(seeds, positions)
    assert values.min() >= 0 and values.max() < 1
    assert stats.kstest(values.numpy(), "uniform").pvalue > 1e-3
    assert uniform(seeds[:1], positions[77:78])[0] == values[77]
    assert (
        len(set(uniform(torch.arange(20_000), torch.zeros(20_000, dtype=torch.int64)).tolist()))
        == 20_000
    )
