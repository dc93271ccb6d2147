"""Data: a written source -> images and labels -> prepared squares -> the views a network sees."""

from onetrunk.data.decoding import decode
from onetrunk.data.images import Images, Prepared, Problem
from onetrunk.data.preprocessing import Preprocessing, view_seeds
from onetrunk.data.sources import load
from onetrunk.data.splits import Splits

__all__ = [
    "Images",
    "Prepared",
    "Preprocessing",
    "Problem",
    "Splits",
    "decode",
    "load",
    "view_seeds",
]
