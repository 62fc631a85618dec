"""The published networks of EDM2 (arXiv 2312.02696, 2406.02507), by the names of its presets."""

from dnnlib import UserError

# Published networks: name -> (network, guide, guidance), all at the address below.
POSTHOC = 'https://nvlabs-fi-cdn.nvidia.com/edm2/posthoc-reconstructions'
_ALONE = {
    'img512-xs-fid': 'img512-xs-2147483-0.135',
    'img512-xs-dino': 'img512-xs-2147483-0.200',
    'img512-s-fid': 'img512-s-2147483-0.130',
    'img512-s-dino': 'img512-s-2147483-0.190',
    'img512-m-fid': 'img512-m-2147483-0.100',
    'img512-m-dino': 'img512-m-2147483-0.155',
    'img512-l-fid': 'img512-l-1879048-0.085',
    'img512-l-dino': 'img512-l-1879048-0.155',
    'img512-xl-fid': 'img512-xl-1342177-0.085',
    'img512-xl-dino': 'img512-xl-1342177-0.155',
    'img512-xxl-fid': 'img512-xxl-0939524-0.070',
    'img512-xxl-dino': 'img512-xxl-0939524-0.150',
    'img64-s-fid': 'img64-s-1073741-0.075',
    'img64-m-fid': 'img64-m-2147483-0.060',
    'img64-l-fid': 'img64-l-1073741-0.040',
    'img64-xl-fid': 'img64-xl-0671088-0.040'
}
_GUIDED = {
    'img512-xs-guid-fid': ('img512-xs-2147483-0.045', 'img512-xs-uncond-2147483-0.045', 1.4),
    'img512-xs-guid-dino': ('img512-xs-2147483-0.150', 'img512-xs-uncond-2147483-0.150', 1.7),
    'img512-s-guid-fid': ('img512-s-2147483-0.025', 'img512-xs-uncond-2147483-0.025', 1.4),
    'img512-s-guid-dino': ('img512-s-2147483-0.085', 'img512-xs-uncond-2147483-0.085', 1.9),
    'img512-m-guid-fid': ('img512-m-2147483-0.030', 'img512-xs-uncond-2147483-0.030', 1.2),
    'img512-m-guid-dino': ('img512-m-2147483-0.015', 'img512-xs-uncond-2147483-0.015', 2),
    'img512-l-guid-fid': ('img512-l-1879048-0.015', 'img512-xs-uncond-2147483-0.015', 1.2),
    'img512-l-guid-dino': ('img512-l-1879048-0.035', 'img512-xs-uncond-2147483-0.035', 1.7),
    'img512-xl-guid-fid': ('img512-xl-1342177-0.020', 'img512-xs-uncond-2147483-0.020', 1.2),
    'img512-xl-guid-dino': ('img512-xl-1342177-0.030', 'img512-xs-uncond-2147483-0.030', 1.7),
    'img512-xxl-guid-fid': ('img512-xxl-0939524-0.015', 'img512-xs-uncond-2147483-0.015', 1.2),
    'img512-xxl-guid-dino': ('img512-xxl-0939524-0.015', 'img512-xs-uncond-2147483-0.015', 1.7),
    'img512-s-autog-fid': ('img512-s-2147483-0.070', 'img512-xs-0134217-0.125', 2.1),
    'img512-s-autog-dino': ('img512-s-2147483-0.120', 'img512-xs-0134217-0.165', 2.45),
    'img512-xxl-autog-fid': ('img512-xxl-0939524-0.075', 'img512-m-0268435-0.155', 2.05),
    'img512-xxl-autog-dino': ('img512-xxl-0939524-0.130', 'img512-m-0268435-0.205', 2.3),
    'img512-s-uncond-autog-fid': (
        'img512-s-uncond-2147483-0.070', 'img512-xs-uncond-0134217-0.110', 2.85),
    'img512-s-uncond-autog-dino': (
        'img512-s-uncond-2147483-0.090', 'img512-xs-uncond-0134217-0.125', 2.9),
    'img64-s-autog-fid': ('img64-s-1073741-0.045', 'img64-xs-0134217-0.110', 1.7),
    'img64-s-autog-dino': ('img64-s-1073741-0.105', 'img64-xs-0134217-0.175', 2.2)
}
PRESETS = {name: (net, None, 1) for name, net in _ALONE.items()} | _GUIDED


def preset_options(name: str) -> dict:
    """net, gnet and guidance of a published preset, with or without the leading edm2-."""
    key = name.removeprefix('edm2-')
    if key not in PRESETS:
        known = ', '.join(f'edm2-{key}' for key in PRESETS)
        raise UserError(f'is unknown; one of: {known}', field='preset', value=name)
    net, gnet, guidance = PRESETS[key]
    return dict(net=f'{POSTHOC}/edm2-{net}.pkl', gnet=gnet and f'{POSTHOC}/edm2-{gnet}.pkl',
                guidance=guidance)
