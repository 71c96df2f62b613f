"""Saving: whole models as one archive of torch.export, or their weights alone; no pickle is written or read."""

from fxsparse.saving.info import SavedInfo as SavedInfo
from fxsparse.saving.info import info as info
from fxsparse.saving.reading import load as load
from fxsparse.saving.weights import load_weights as load_weights
from fxsparse.saving.weights import save_weights as save_weights
from fxsparse.saving.writing import save as save
