"""Torch functions that generated code calls where one ATen call does not do.

Generated code sees this package as ``kernels``. One file a family of ops.
"""

from daggc.backend.kernels.activation import celu_backward, log_sigmoid_backward
from daggc.backend.kernels.attention import attention, attention_backward, attention_mask_grad
from daggc.backend.kernels.check import check
from daggc.backend.kernels.complex_numbers import view_as_complex
from daggc.backend.kernels.constant import constant
from daggc.backend.kernels.control import cond, scan, while_loop
from daggc.backend.kernels.conv import (
    conv_channels_last,
    conv_input_grad,
    conv_weight_grad,
)
from daggc.backend.kernels.ctc import ctc_loss, ctc_loss_backward
from daggc.backend.kernels.doors import python_call, torch_call
from daggc.backend.kernels.embedding_bag import embedding_bag
from daggc.backend.kernels.indexing import index_put
from daggc.backend.kernels.linalg import cdist_backward, ldl_solve, lstsq, permutation
from daggc.backend.kernels.loss import nll_loss_backward
from daggc.backend.kernels.norm import (
    batch_norm,
    batch_norm_backward,
    batch_norm_eval_backward,
    group_norm,
    group_norm_backward,
    layer_norm,
    layer_norm_backward,
    rms_norm,
    rms_norm_backward,
)
from daggc.backend.kernels.optim import adamw_update, adamw_update_, sgd_update, sgd_update_, squared_norm
from daggc.backend.kernels.pool import (
    adaptive_avg_pool,
    adaptive_avg_pool_backward,
    avg_pool,
    avg_pool_backward,
    max_pool_backward,
)
from daggc.backend.kernels.random import bernoulli, normal, randint, randperm, uniform
from daggc.backend.kernels.recurrent import recurrent_layer, recurrent_layer_backward

__all__ = [
    "adamw_update",
    "adamw_update_",
    "adaptive_avg_pool",
    "adaptive_avg_pool_backward",
    "attention",
    "attention_backward",
    "attention_mask_grad",
    "avg_pool",
    "avg_pool_backward",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_eval_backward",
    "bernoulli",
    "cdist_backward",
    "celu_backward",
    "check",
    "cond",
    "constant",
    "conv_channels_last",
    "conv_input_grad",
    "conv_weight_grad",
    "ctc_loss",
    "ctc_loss_backward",
    "embedding_bag",
    "group_norm",
    "group_norm_backward",
    "index_put",
    "layer_norm",
    "layer_norm_backward",
    "ldl_solve",
    "log_sigmoid_backward",
    "lstsq",
    "max_pool_backward",
    "nll_loss_backward",
    "normal",
    "permutation",
    "python_call",
    "randint",
    "randperm",
    "recurrent_layer",
    "recurrent_layer_backward",
    "rms_norm",
    "rms_norm_backward",
    "scan",
    "sgd_update",
    "sgd_update_",
    "squared_norm",
    "torch_call",
    "uniform",
    "view_as_complex",
    "while_loop",
]
