"""The features of an SAE that a run watches, from the calibration pass on."""

from __future__ import annotations

from accelerate import Accelerator
from torch import Tensor

from ..readouts.sae_reader import SAEReader
from .features import ExcitingReader
from .sae import FeatureCalibration, FeatureMonitor, FeatureStatistics


class FeatureWatch:
    """Finds out in the calibration pass what the features' scores mean, and which features to watch; then monitors these.

    Args:
        reader: Reads all features of the SAE; `None` where none are to be watched.
        most: How many to watch, those that the data pushes most; `None` for all.
        window: Pairs that the running estimates reach back.
        accelerator: The run's.

    Attributes:
        reader: Reads the features: all of them, once calibrated those that are watched.
        monitor: Their estimates, once calibrated.
    """

    def __init__(self, reader: SAEReader | None, most: int | None, window: int, accelerator: Accelerator) -> None:
        self.reader = reader
        self.monitor: FeatureMonitor | None = None
        self._most, self._window, self._accelerator = most, window, accelerator
        self._calibration: FeatureCalibration | None = None

    @property
    def needs_calibration(self) -> bool:
        """Whether the features have no statistics yet."""
        return self.reader is not None and self.monitor is None

    def calibration_reader(self) -> ExcitingReader | None:
        """What reads the features in the calibration pass, which begins with this."""
        if not self.needs_calibration:
            return None
        assert self.reader is not None
        self._calibration = FeatureCalibration(self.reader.n_features, self._accelerator.device)
        return ExcitingReader(self.reader)

    def calibrate_batch(self, features: Tensor, reader: ExcitingReader, input_ids: Tensor, keep: Tensor) -> None:
        """Take a batch of the calibration pass: `(2B, F)` raw scores, `(2B, T)` ids, and `(B,)` bool, the pairs that count."""
        assert self._calibration is not None
        self._calibration.add(features, input_ids.gather(1, reader.positions), keep)

    def calibrated(self) -> SAEReader:
        """End the calibration pass.

        Returns:
            What reads the features from now on.
        """
        assert self._calibration is not None
        assert self.reader is not None
        statistics = self._calibration.finish(self._accelerator)
        self._calibration = None
        if self._most is not None and self._most < self.reader.n_features:
            keep = statistics.delta.abs().topk(self._most).indices.sort().values
            statistics = statistics.narrowed(keep)
        return self.watch(statistics).reader

    def watch(self, statistics: FeatureStatistics) -> FeatureMonitor:
        """Monitor the features that these statistics are of, by the calibration pass or from a checkpoint."""
        assert self.reader is not None
        if len(statistics.ids) < self.reader.n_features:
            self.reader = self.reader.narrowed(statistics.ids.tolist())
        self.monitor = FeatureMonitor(self.reader, statistics, self._window)
        return self.monitor
