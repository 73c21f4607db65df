"""One part of a model on one rank: forward, the backward in one or two halves, and its weights in versions.

The gradient of a part's input ("I") is what the rank before it waits for; those of the weights ("W") can wait. `SplitLinear`
puts a linear layer's weight gradient off until it is asked for: the two matrix products of its backward, which autograd runs
together, become two operations of a schedule. Norms and embeddings, with next to no work, get theirs in I.
"""

import torch
from torch import nn
from torch.func import functional_call

from yardstick.model import loss_of


class _LinearLater(torch.autograd.Function):
    """y = x w^T + b. Backward gives dx = dy w at once and leaves dw = dy^T x, db = sum dy for later."""

    @staticmethod
    def forward(ctx, x, weight, bias, layer):
        ctx.save_for_backward(x, weight)
        ctx.layer, ctx.leaves = layer, (weight, bias)
        return torch.nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        leaves = ctx.leaves

        def weight_gradients():
            rows, columns = dy.flatten(0, -2), x.flatten(0, -2)
            _add(leaves[0], rows.T @ columns)
            if leaves[1] is not None:
                _add(leaves[1], rows.sum(0))
        ctx.layer.later.append(weight_gradients)
        return dy @ weight, None, None, None


def _add(leaf, gradient):
    leaf.grad = gradient if leaf.grad is None else leaf.grad.add_(gradient)      # in place, as autograd does


class Part(nn.Module):
    """Layers of a model in a row, whose linear layers put their weight gradients off to `later`."""

    def __init__(self, layers, place, last):
        super().__init__()
        self.layers, self.place, self.last, self.later = nn.ModuleList(layers), place, last, []
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.forward = self._forward_of(module)

    def _forward_of(self, linear):
        return lambda x: _LinearLater.apply(x, linear.weight, linear.bias, self)

    def forward(self, x, targets=None):
        for layer in self.layers:
            x = layer(x)
        return loss_of(x, targets) if self.last else x


class Stage:
    """A Part with its weights in versions: version v is a list of tensors, in the order of Part.parameters().

    rate: learning rate of plain SGD. naive: one version, changed in place, so that a backward meets other weights than its forward
    did. group, copies: the process group, and the number, of the ranks that hold this part.
    """

    def __init__(self, part, rate, naive=False, group=None, copies=1):
        self.part, self.rate, self.naive, self.group, self.copies = part, rate, naive, group, copies
        self.names = [name for name, _ in part.named_parameters()]
        self.versions, self.newest = {0: [weight.detach().clone().requires_grad_() for weight in part.parameters()]}, 0
        self.under_way = {}                        # micro-batch: (input, output, version), between its F and its B or I
        self.held_back = {}                        # micro-batch: weight gradients that wait for its W

    def weights_of(self, version):
        return self.versions[0 if self.naive else version]

    def forward(self, k, x, version, targets=None):
        """The output for the next part, or the last part's loss; kept with x until the backward of k."""
        if x.is_floating_point():
            x = x.detach().requires_grad_()
        weights = dict(zip(self.names, self.weights_of(version)))
        y = functional_call(self.part, weights, (x,) if targets is None else (x, targets))
        self.under_way[k] = x, y, version
        return y.detach()

    def backward(self, k, gradient=None, split=False, scale=1.0):
        """The gradient of micro-batch k's input, None for tokens. gradient: of the output; the last part begins with `scale`.

        split: the gradients of the linear weights wait for `weights`.
        """
        x, y, _ = self.under_way.pop(k)
        self.part.later = []
        y.backward(torch.full_like(y, scale) if self.part.last else gradient)
        self.held_back[k] = self.part.later
        if not split:
            self.weights(k)
        return x.grad

    def weights(self, k):
        with torch.no_grad():
            for gradient in self.held_back.pop(k):
                gradient()

    def in_use(self):
        """Versions that a backward to come needs."""
        return [version for _, _, version in self.under_way.values()]

    def take_gradients(self, version):
        """[gradient of each weight] gathered so far on a version, which then has none."""
        found = []
        for leaf in self.weights_of(version):
            found.append(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad)
            leaf.grad = None
        return found

    def update(self, gradients, keep_from):
        """w(t+1) = w(t) - rate * gradient as a new version; those before keep_from go, the new one never."""
        leaves = self.weights_of(self.newest)
        self.newest += 1
        if self.naive:
            for leaf, gradient in zip(leaves, gradients):
                leaf.data.sub_(self.rate * gradient)            # .data: autograd does not notice, which is the point
            return
        self.versions[self.newest] = [(leaf.detach() - self.rate * gradient).requires_grad_()
                                      for leaf, gradient in zip(leaves, gradients)]
        for version in [version for version in self.versions if version < min(keep_from, self.newest)]:
            del self.versions[version]
