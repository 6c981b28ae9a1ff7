"""What the names of modules say of how they are connected: patterns of names in lower case, without numbers."""

import re

RESIDUAL_BLOCK = re.compile(
    r"(.*_)?(pre_?act(ivation)?_?|wide_?|inverted_?|basic_?|bottleneck_?)*"
    r"(res(net|idual)?|basic|bottleneck|pre_?act(ivation)?)_?(v\d_?)?(basic_?|bottleneck_?)*block"
)
# Of these, where normalisation layers come before the layers of their number.
PREACTIVATED_BLOCK = re.compile(r".*pre_?act.*")
# A block of which nothing tells whether it is residual, as in a list of blocks.
SOME_BLOCK = re.compile(r"(.*_)?blocks?")

# The projection beside a residual block, or its normalisation layer; of the second name it may be a layer of the block.
SHORTCUT = re.compile(r".*(shortcut|downsample|skip).*|(.*(conv|norm)_?)?proj(ection)?")
PROJECTION = re.compile(r"proj(ection)?")

ATTENTION = re.compile(r".*att(entio)?n.*")
TRANSPOSED = re.compile(r".*transpose.*")

# Networks that are given the same, rather than one of them what the other gives out.
SIDE_BY_SIDE = re.compile(
    r"(actor|critic|policy|pi|value|values|vf|qf|q|target|online|teacher|student|branch|tower|left|right|generator"
    r"|discriminator)(_?(net|network|head|fn|function|model))?"
)
# What scales or shifts the outputs of other layers, or is added to them.
ASIDE = re.compile(
    r"se(_?(net|block|layer|module))?|squeeze.*|.*excit.*|.*gat(e|ing).*|film.*|time.*|cond.*|lora.*|adapter.*"
)

# Where the normalisation layers of a transformer are, in their order.
FIRST_NORM = re.compile(r"(.*_)?(emb\w*|pre|in|input)(_.*)?")
ATTENTION_NORM = re.compile(r"(?!post)(.*_)?(self_?)?att(entio)?n(_.*)?")
HIDDEN_NORM = re.compile(r"post_?att\w*|(.*_)?(mlp|ffn?|feed_?forward)(_.*)?")
LAST_NORM = re.compile(r"(.*_)?(f|post|last|final|out|output)(_.*)?")
NORMS = (FIRST_NORM, ATTENTION_NORM, HIDDEN_NORM, LAST_NORM)
