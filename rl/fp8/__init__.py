"""FP8 training, as DeepSeek-V3 does it (arXiv:2412.19437, section 3.3), for post-training.

Eight bits are enough if no scale has to serve values of very different size. E4M3 has three bits of mantissa and reaches from 2^-9 to
448; one scale for a whole tensor is set by its largest value, and a row that is ten thousand times smaller is rounded to zero. So
every 1x128 tile of an activation and every 128x128 block of a weight has a scale of its own, and an outlier spoils its own tile only.

    y  = Q(x) Q(W)^T        Fprop: tiles of x along K, blocks of W
    dx = Q(dy) Q(W)         Dgrad: tiles of dy along N, the same blocks of W, transposed for free because they are square
    dW = Q(dy)^T Q(x)       Wgrad: both in 128x1 tiles along the tokens

Products are taken 128 wide along the summed dimension, scaled, and added up in FP32 (`reference.py`: the specification that every
kernel is held against). What the backward needs of x is saved as codes and not as BF16: their scales are powers of two, so the
change from 1x128 to 128x1 tiles costs next to nothing. The experts save codes of their input and of what SwiGLU takes, and compute
its output again. Tokens are quantised once, before they are dispatched to experts.

Masters are FP32 parameters under their usual names. Codes are a function of them (`weights.py`), so what trains, what is pushed to
the engines and what is saved are the same codes and scales, in the layout of DeepSeek-V3's checkpoints: `weight` in E4M3 beside
`weight_scale_inv` in FP32. Embedding, output head, gates, norms and the attention core stay as they are.

    quantize.py    QTensor, and the one formula of a scale        weights.py     codes of a master, made again when it has changed
    reference.py   the products, in plain torch                   linear.py      a linear layer
    scaled_mm.py   the same on Hopper through torch               experts.py     the experts of a layer, from dispatch to combine
    kernels.py     the same in Triton                             convert.py     a transformers model becomes an FP8 one
    backends.py    the three by name                              layout.py      names and config of a checkpoint, as DeepSeek-V3 has them
    files.py       reads block-FP8 files                          folder.py      policy folders, from and to FP8
    decode.py      the same, as they arrive on the wire           sharded.py     masters and codes that ranks share
"""
