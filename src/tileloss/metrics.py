"""The distances that tileloss knows by name, and what all their implementations agree on."""

from __future__ import annotations

METRICS = ("euclidean", "squared_euclidean", "cosine", "manhattan", "dot")

# squared Euclidean distances come from a difference of squares, |x|^2 + |y|^2 - 2xy, which rounds: two equal rows come
# out a few units apart in the last place. What is no larger than this counts as zero. The unit is the dtype's epsilon
# times |x|^2 + |y|^2; equal rows of up to 4,096 numbers were seen up to 17 apart
ROUNDING = 32.0
