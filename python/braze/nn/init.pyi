# For type checkers only: at run time this name is torch's own module.
from torch.nn.init import *
