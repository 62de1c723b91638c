"""Convolutional networks for small images, written out: a ResNet-18, a VGG and a MobileNet.

All three have the same frame, so that they can be compared: a 3 × 3 convolution that keeps the
side, four stages of widths w, 2w, 4w and 8w of which the last three halve the side, a mean over
what is left of it, and one linear layer. Every convolution is followed by batch normalisation and
has no bias. Weights start as torch starts them.
"""

from torch import Tensor, nn


class ConvolutionalNet(nn.Module):
    """Features of an image, their mean over the places, and a linear layer.

    Args:
        features: from `[rows, channels, height, width]` to `[rows, num_features, any, any]`.
        num_features: what the linear layer takes.
        num_classes: what it gives.

    Example:
        >>> net = ConvolutionalNet(resnet18(channels=3, width=64), 512, 10)
        >>> sum(parameter.numel() for parameter in net.parameters())
        11173962
    """

    def __init__(self, features: nn.Module, num_features: int, num_classes: int) -> None:
        """Make the module; torch's global random generator decides the initial weights."""
        super().__init__()
        self.features = features
        self.head = nn.Linear(num_features, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits, `[rows, num_classes]`, of images, `[rows, channels, height, width]`."""
        return self.head(self.features(images).mean((2, 3)))

    def get_output_embeddings(self) -> nn.Linear:
        """The output layer, asked for as transformers' models are."""
        return self.head


class Residual(nn.Module):
    """y = after(x + branch(x)), with a 1 × 1 convolution of x where the two differ in shape."""

    def __init__(
        self, branch: nn.Module, inputs: int, outputs: int, stride: int, after: nn.Module
    ) -> None:
        """Make the block; `branch` goes from `inputs` to `outputs` channels at this stride."""
        super().__init__()
        same = inputs == outputs and stride == 1
        self.branch = branch
        self.shortcut = nn.Identity() if same else convolution(inputs, outputs, 1, stride=stride)
        self.after = after

    def forward(self, x: Tensor) -> Tensor:
        """The block's output, `[rows, outputs, height / stride, width / stride]`."""
        return self.after(self.shortcut(x) + self.branch(x))


def resnet18(*, channels: int, width: int) -> nn.Module:
    """The features of ResNet-18 in its form for small images: two residual blocks a stage.

    Unlike the form for ImageNet it begins with a 3 × 3 convolution of stride 1, no pooling.

    Args:
        channels: of the images.
        width: of the first stage, 64 in the paper; the last has 8 times as many.

    Source: arXiv 1512.03385, sections 3.3 and 4.2.

    Example:
        >>> import torch
        >>> resnet18(channels=1, width=4)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 32, 1, 1])
    """
    layers = [convolution(channels, width), nn.ReLU()]
    inputs = width
    for outputs, stride in _stages(width):
        for each in (stride, 1):
            branch = nn.Sequential(
                convolution(inputs, outputs, stride=each), nn.ReLU(), convolution(outputs, outputs)
            )
            layers.append(Residual(branch, inputs, outputs, each, nn.ReLU()))
            inputs = outputs
    return nn.Sequential(*layers)


def vgg(*, channels: int, width: int) -> nn.Module:
    """The features of a VGG: two 3 × 3 convolutions a stage and nothing beside them.

    Args:
        channels: of the images.
        width: of the first stage; the last has 8 times as many.

    Source: arXiv 1409.1556, with batch normalisation, and without its three linear layers.

    Example:
        >>> import torch
        >>> vgg(channels=1, width=4)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 32, 1, 1])
    """
    layers: list[nn.Module] = []
    inputs = channels
    for outputs, stride in _stages(width):
        layers += [nn.MaxPool2d(stride)] if stride > 1 else []
        layers += [convolution(inputs, outputs), nn.ReLU()]
        layers += [convolution(outputs, outputs), nn.ReLU()]
        inputs = outputs
    return nn.Sequential(*layers)


def mobilenet(*, channels: int, width: int, expansion: int = 4) -> nn.Module:
    """The features of a MobileNet: two inverted residual blocks a stage.

    A block widens by a 1 × 1 convolution, looks at each channel by itself (depthwise), and narrows
    without an activation.

    Args:
        channels: of the images.
        width: of the first stage; the last has 8 times as many.
        expansion: times which a block is wider inside, at least 1. Default 4.

    Source: arXiv 1801.04381, section 3. Where a block changes the shape, it has a 1 × 1
    convolution beside it here, so that all three families have the same frame.

    Example:
        >>> import torch
        >>> mobilenet(channels=1, width=4)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 32, 1, 1])
    """
    layers = [convolution(channels, width), nn.ReLU6()]
    inputs = width
    for outputs, stride in _stages(width):
        for each in (stride, 1):
            inside = expansion * inputs
            branch = nn.Sequential(
                convolution(inputs, inside, 1),
                nn.ReLU6(),
                convolution(inside, inside, stride=each, groups=inside),
                nn.ReLU6(),
                convolution(inside, outputs, 1),
            )
            layers.append(Residual(branch, inputs, outputs, each, nn.Identity()))
            inputs = outputs
    return nn.Sequential(*layers)


def convolution(
    inputs: int, outputs: int, size: int = 3, *, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    """A convolution that keeps the side at stride 1, without a bias, and its normalisation."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    )


def _stages(width: int) -> list[tuple[int, int]]:
    """Width and stride of the four stages."""
    return [(width, 1), (2 * width, 2), (4 * width, 2), (8 * width, 2)]


FAMILIES = {"resnet18": resnet18, "vgg": vgg, "mobilenet": mobilenet}
