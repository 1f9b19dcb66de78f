"""The counter-based generator against numpy's, by way of a textbook version that serves both word
sizes, and published answers."""

import numpy as np
import torch
from pagewire_kernels.philox import philox, sampling_words
from pagewire_kernels.sampling_map import gumbel
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
    return tuple(np.array(column, np.uint64) for column in zip(*rows, strict=True))


def test_textbook_version_is_numpys():
    generator = np.random.Philox(
        key=np.array([123, 456], np.uint64), counter=np.array([7, 0, 2, 0], np.uint64)
    )
    assert tuple(int(x) for x in generator.random_raw(4)) == textbook((8, 0, 2, 0), (123, 456), 64)


def test_ours_equals_the_textbook_and_the_published_answers():
    random = np.random.default_rng(0)
    counters = random.integers(0, 2**32, (500, 4)).tolist() + [list(c) for c, _, _ in KNOWN]
    keys = random.integers(0, 2**32, (500, 2)).tolist() + [list(k) for _, k, _ in KNOWN]
    ours = np.stack(philox(words(counters), words(keys)), 1).tolist()
    assert ours == [list(textbook(c, k, 32)) for c, k in zip(counters, keys, strict=True)]
    assert [tuple(row) for row in ours[500:]] == [answer for _, _, answer in KNOWN]


def test_sampling_words_are_of_seed_position_and_group():
    seeds, positions, groups = [5, 2**62 + 12345], [2**33 + 1, 7], [12, 2**31]
    ours = sampling_words(*(np.array(column) for column in (seeds, positions, groups))).tolist()
    for i in range(2):
        low, high = seeds[i] & 0xFFFFFFFF, seeds[i] >> 32
        counter = (groups[i], positions[i] & 0xFFFFFFFF, positions[i] >> 32, 0)
        assert ours[i] == list(textbook(counter, (low, high), 32))


def test_noise_follows_gumbels_distribution():
    count = np.zeros(20_000, np.int64)
    words = sampling_words(count + 2**62 + 11, np.arange(20_000), count)
    noise = gumbel(torch.from_numpy(words)).numpy()
    assert all(stats.kstest(noise[:, i], "gumbel_r").pvalue > 1e-3 for i in range(4))
    assert len({tuple(row) for row in words.tolist()}) == 20_000


def test_noise_of_the_smallest_and_the_largest_words_is_finite_and_accurate():
    words = torch.tensor([0, 1, 2**20, 2**25, 2**26, 2**31, 2**32 - 2**20, 2**32 - 1])
    u = (words.double() + 0.5) * 2.0**-32
    exact = -torch.log(-torch.log1p(-u))
    noise = gumbel(words).double()
    torch.testing.assert_close(noise[:-1], exact[:-1], rtol=1e-4, atol=1e-4)
    assert -2.9 < noise[-1] < noise[-2] and noise[0] < 23.0
