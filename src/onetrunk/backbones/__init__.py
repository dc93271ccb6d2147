"""Where a backbone comes from, its written form and its fingerprint."""

from .fingerprint import fingerprint as fingerprint
from .resnet26 import ResNet26 as ResNet26
from .resnet26 import resnet26 as resnet26
from .written_form import backbone as backbone
from .written_form import written_form as written_form
