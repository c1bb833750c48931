"""The command line's work: from a checkpoint and images to files to ship.

- ``job``: train a float or a low-bit network; ``evaluate``: measure a file; ``inspect``: what a job would do.
- ``files``: export, compare and time what a run left; ``runs``: read run folders (without torch).
- What these are made of, and imports none of them: ``tasks`` (classification, segmentation, detection), ``data``
  (images and batches), ``networks`` (float networks and checkpoints), ``bits`` (budgets and sensitivities),
  ``statistics`` (histograms), ``machine`` (the device), ``run_folder`` (what a run writes).
"""
