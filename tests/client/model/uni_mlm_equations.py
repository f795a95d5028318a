"""Equations (1) to (4) of UNI-MLM in loops, for one record."""

from __future__ import annotations

import math


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def transcribed_avg(logits, labels, prevalence) -> float:
    """Equations (1), (2), (4) with one minus and w_c = 1 / (2 K p_c)."""
    tasks, total = len(logits), 0.0
    for z, y, p in zip(logits, labels, prevalence, strict=True):
        if y == -1:
            continue
        phi = sigmoid(z)
        plus = 1 / (2 * tasks * p) * math.log(phi)
        minus = 1 / (2 * tasks * (1 - p)) * math.log(1 - phi)
        total += y * plus + (1 - y) * minus
    return -total


def transcribed_asl(logits, labels, margin, gamma) -> float:
    """Equations (1), (3), (4) with one minus."""
    total = 0.0
    for z, y in zip(logits, labels, strict=True):
        if y == -1:
            continue
        phi = sigmoid(z)
        shifted = max(phi - margin, 0)
        total += y * (1 - phi) * math.log(phi) + (1 - y) * shifted**gamma * math.log(1 - shifted)
    return -total
