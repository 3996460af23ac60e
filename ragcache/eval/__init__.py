"""Measure answer quality and cost of modes on data sets of questions.

``dataset`` reads questions with their chunks, ``evaluate`` asks them in every mode (``parallel``:
in several processes), ``metrics`` scores the answers, and ``summary`` computes the figures of each
mode with confidence intervals (``bootstrap``). ``calibrate`` finds the cheapest mode and ratio
without labels, ``promise`` tests what may be promised about them, and ``plot`` draws quality
against cost.
"""
