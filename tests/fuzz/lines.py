"""Lines that users write in a lane, on ``h``; a case holds the text itself."""

from __future__ import annotations


def _table(text: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.strip().splitlines())


ELEMENTWISE = _table("""
    h = torch.tanh(h)
    h = F.relu(h)
    h = F.gelu(h)
    h = F.silu(h)
    h = F.elu(h)
    h = F.leaky_relu(h, 0.1)
    h = F.softplus(h)
    h = h.sigmoid()
    h = h * h.sigmoid()
    h = h.clamp(-1, 1)
    h = torch.where(h > 0, h, 0.5 * h)
    h = h.softmax(-1)
    h = (h.abs() + 1).log()
    h = h.sin() + h.cos()
    h = h / (1 + h.norm(dim=-1, keepdim=True))
    h = F.hardswish(h)
    h = h - h.mean(-1, keepdim=True)
    h = (h**2 + 1) ** 0.5
    h = torch.exp(-h.abs())
    h = 1 - h
    h = -h
    h = F.mish(h)
    h = h.masked_fill(h < -1, -1.0)
    h = torch.maximum(h, h.new_zeros(()))
    h = h.float().to(h.dtype)
    h = torch.lerp(h, h.tanh(), 0.3)
    h = F.normalize(h, dim=-1)
    h = torch.cat([h, h], -1)[..., : h.shape[-1]]
    h = 2 * h / h.shape[-1]
    h = torch.addcmul(h, h, h, value=0.1)
    h = h.detach() + h
    h = h.detach()
""")

MODULES = _table("""
    nn.ReLU()
    nn.ReLU(inplace=True)
    nn.Tanh()
    nn.ELU(inplace=True)
    nn.Softmax(-1)
    nn.Identity()
    nn.GELU()
    nn.Hardtanh(inplace=True)
    nn.PReLU()
    nn.Dropout(0.0)
    nn.LeakyReLU(0.3, inplace=True)
    nn.Sequential(nn.Tanh(), nn.Sigmoid())
    nn.Softplus(beta=2)
    nn.Flatten()
""")

# Writes: into a tensor of the lane's own, or through a view into what the lane was given.
IN_PLACE = _table("""
    h += 0.5
    h *= 2
    h.relu_()
    torch.tanh_(h)
    h.clamp_(-1, 1)
    h[:1] = 0.25
    h[..., 0] = 0.5
    h[..., 0] += 1
    h[..., -1:] *= 3
    h.neg_()
    h.add_(h.detach())
    h.sub_(1).mul_(2)
    h.masked_fill_(h > 1, 1.0)
    h.copy_(h.flip(-1))
    h[..., 0].zero_()
    F.relu(h, inplace=True)
    h.exp_().log1p_()
    h.transpose(0, -1).mul_(2)
    h.view(-1)[:1].fill_(0.1)
    h.squeeze_()
    h.unsqueeze_(-1)
    h[h > 1] = 1.0
    h -= h.mean()
    h.fill_(h.mean())
    h.detach_()
    h.t_()
    h.normal_()
    h.addcmul_(h.detach(), h.detach())
    h.lerp_(h.detach() ** 2, 0.3)
    h.sub_(h.detach(), alpha=2)
    h[1:, ..., 0] = h[:-1, ..., 0].clone()
    h[torch.arange(h.shape[0] - 1)] += 1.0
    h.view(-1)[::2] = 0.0
    h.T[0] = 0.25
    h.copy_(h.detach()[:1].expand(h.shape))
    h.cumsum_(-1)
    h //= 0.5
    h.ge_(0.1)
    a = h[..., 0]; h.mul_(2); h = h + a.unsqueeze(-1)
    g = h; g += 1; h = g * h
    h[:, 0], h[:, -1] = h[:, -1].clone(), h[:, 0].clone()
""")

SHAPES = _table("""
    h = h.unsqueeze(1)
    h = h.unsqueeze(-1).transpose(1, -1)
    h = h.flatten(1)
    h = h.flip(-1)
    h = h.repeat(1, 2)
    h = h.roll(1, -1)
    h = torch.cat([h, h.tanh()], -1)
    h = h.transpose(1, -1)
    h = h.reshape(h.shape[0], -1)
    h = h.view(h.size(0), -1)
    h = torch.stack([h, h * 2], 1)
    h = h[..., ::2]
    h = h[..., :1]
    h = h[..., [0, 0]]
    h = h.chunk(2, -1)[0]
    h = h.sum(-1)
    h = h.amax(-1)
    h = h.mean(1)
    h = h.cumsum(-1)
    h = h.expand(2, *h.shape)[1]
    h = h.contiguous()
    h = h.clone()
    h = h[:, None]
    h = h.permute(0, *range(h.dim() - 1, 0, -1))
    h = h.unfold(-1, 1, 1)
    h = h.std(-1, keepdim=True, unbiased=False)
    h = h.max(-1)[0]
    h = h.sort(-1).values
    h = h.topk(1).values
    h = torch.split(h, 1, -1)[0]
    h = torch.einsum('n...->...n', h).movedim(-1, 0)
    h = F.pad(h, (1, 1))
    h = h.as_strided(h.shape, h.stride())
    h = h.unbind(-1)[0]
    h = torch.flatten(h, 1).unflatten(1, (-1, 1))
    h = h.transpose(1, -1).reshape(h.shape[0], -1)
    h = h.transpose(0, 1).contiguous().transpose(0, 1)
    h = torch.fft.fft(h, dim=1).real
    h = torch.view_as_real(torch.view_as_complex(torch.stack([h, h * 2], -1)) * 1j).flatten(-2)
""")

# What looks at more than a lane's own row: at sizes, the mode, the data, other rows.
ODD = _table("""
    h = h - h.mean(0, keepdim=True)
    h = h / h.shape[0]
    h = h * h.softmax(0)
    h = h + torch.arange(h.shape[0]).view(-1, *[1] * (h.dim() - 1))
    h = h * torch.ones(h.shape[0], *[1] * (h.dim() - 1), dtype=h.dtype)
    h = h + h.sum() / h.numel()
    h = h[torch.arange(h.shape[0] - 1, -1, -1)]
    h = h * 2 if self.training else h
    h = F.dropout(h, 0.0, self.training)
    h = h + 1 if h.sum() > 0 else h - 1
    h = h * h.max().item()
    h = Straight.apply(h)
    h = sum(h[k : k + 1] for k in range(h.shape[0])) + h
    h = h + len(h)
    h = checkpoint(torch.tanh, h, use_reentrant=False)
    h = h + torch.zeros_like(h).normal_().mul_(0)
    h = h + h.detach().numpy().shape[0]
    h = h.to(torch.float32).to(h.dtype)
    h = h + (h > 0).sum().to(h.dtype)
    h = h * (0.5 + float(h.shape[-1]))
    h = h[h.abs() < 100].reshape(h.shape)
    h = torch.vmap(torch.sin)(h)
    h = h + torch.tensor(2.0, dtype=h.dtype)
    h = h.requires_grad_(h.requires_grad) * 1
    h = h if torch.is_grad_enabled() else h * 1.0
    h = h + torch.tensor([0.5] * h.shape[-1], dtype=h.dtype)
    h = h.detach().requires_grad_() * 2
    self.last = h.shape[0]
    h = torch.cat([h[1:], h[:1]])
    h = h.cumsum(0)
    h = h - h.amin(0) if h.shape[0] else h
    h = h * 1.0 if h.is_contiguous() else h * 1.5
    h = torch.atleast_2d(h)
    h = h + torch.randn(2, generator=torch.Generator().manual_seed(1)).sum().to(h.dtype)
""")

# Numbers and tensors per lane. {i}: the lane; {own}, {vector}: Parameters of the lane; {buffer}: of the lane; {common}: of all lanes.
NUMBERS = _table("""
    h = h * (0.5 + {i})
    h = h + {i}
    h = h * {own}
    h = h + {vector}
    h = h * {buffer}
    h = h / (1 + {common} ** 2)
    h = h * {common}
    h = h.clamp(-1 - {i}, 2.0)
    h = (h.abs() + 0.1) ** (1 + {i})
    h = h * torch.tensor(0.5 + {i}, dtype=h.dtype)
    h = F.leaky_relu(h, 0.1 * {i})
    h = h.roll({i}, -1)
    h = h if {i} else h * 2
    h = F.elu(h, 1.0 + {i})
    h = torch.where(h > {own}, h, {vector})
    h = h * F.softplus({own}) + {i}
    h = h - {vector}.detach()
    h = torch.lerp(h, {vector}, 0.5)
    h = h * {vector}.softmax(0) + {own}.exp()
""")

# Products with a weight {w} of [in, out] and a bias {b} of [out].
PRODUCTS = _table("""
    h = h @ {w}
    h = F.linear(h, {w}.t(), {b})
    h = torch.einsum('...i,io->...o', h, {w}) + {b}
    h = torch.matmul(h, {w}) * {b}
    h = torch.addmm({b}, h.reshape(-1, {n}), {w}).reshape(*h.shape[:-1], {out})
    h = torch.tensordot(h, {w}, 1)
    h = h @ ({w} / {w}.norm(dim=0)) + {b}
    h = (h.unsqueeze(-1) * {w}).sum(-2)
    h = F.linear(h, {w}.t().softmax(-1))
""")

NORMS = _table("""
    LayerNorm
    BatchNorm
    BatchNorm momentum=None
    BatchNorm track_running_stats=False
    GroupNorm
    InstanceNorm1d
    InstanceNorm1d track_running_stats=True
    InstanceNorm2d
    RMSNorm
""")

POOLS = _table("""
    h = F.max_pool1d(h, 2)
    h = F.max_pool2d(h, 2)
    h = F.avg_pool1d(h, 2, 1)
    h = F.adaptive_avg_pool2d(h, 1)
    h = F.interpolate(h, scale_factor=2)
    h = F.avg_pool2d(h, 2, stride=1, padding=1)
""")

RESIDUALS = _table("""
    h = h + {kept}
    h = {kept} * h.sigmoid()
    h = {kept} - 0.5 * h
    h += {kept}
    h = torch.stack([{kept}, h]).sum(0)
    h = torch.where({kept} > h, {kept}, h)
""")

STATES = _table("""
    {b}.add_(1)
    {b}.mul_(0.9).add_(0.1 * h.detach().mean())
    {b}.copy_(h.detach().sum())
    {b} += 1
    h = h + {b}
    torch.no_grad()(lambda: {b}.mul_(0.9).add_(h.sum(), alpha=0.1))()
    {b}.data.copy_({b} * 0.5 + h.mean())
    torch.no_grad()(lambda: {b}.fill_(1).div_(h.abs().sum() + 1))()
""")
# Derivatives inside of forward, of what follows from ``h`` alone.
ENERGIES = _table("""
    h = torch.autograd.grad((z * z.tanh()).sum(), z, create_graph=True)[0]
    h = z - 0.1 * torch.autograd.grad(z.softmax(-1).square().sum(), z, create_graph=True)[0]
    h = torch.autograd.grad(z.exp().sum(), z)[0] * z
""")
