"""Run where this project is not: what exported folders do in diffusers. Writes images and relative errors for the test."""

import importlib.util
import json
import os
import shutil
import sys

import diffusers
import numpy as np
import safetensors.torch
import torch
from diffusers import DiffusionPipeline

diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()

ROOT = sys.argv[1]
NAMES = sys.argv[2].split(',')
OURS = ('training', 'torch_utils', 'dnnlib', 'metrics', 'diffusion_data')
errors = {}


def load(folder, **options):
    pipe = DiffusionPipeline.from_pretrained(f'{ROOT}/{folder}', trust_remote_code=True, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pixels(images):
    return np.stack([np.asarray(image) for image in images.images])


def refused(message, call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except Exception as error:
        assert type(error).__name__ in ('UserError', 'ValueError') and message in str(error), (type(error), error, message)
    else:
        raise AssertionError(f'not refused: {message}')


def same(name, pipe, scheduler, ours, theirs, **options):
    """Relative error of the images by a scheduler of diffusers and by our own sampler."""
    options |= dict(seeds=range(3), output_type='latent')
    wanted = pipe(**options, **ours).images
    assert wanted.std() > 0.05
    pipe.scheduler = pipe.make_scheduler(scheduler)
    images = pipe(**options, **theirs).images
    pipe.scheduler = None
    errors[name] = ((images - wanted).norm() / wanted.norm()).item()


assert not any(map(importlib.util.find_spec, OURS))
pipes = {name: load(name) for name in NAMES}                        # all of them beside each other
images = {name: pixels(pipe(seeds=range(3), num_inference_steps=3)) for name, pipe in pipes.items()}

for name, pipe in pipes.items():                                    # what diffusers calls
    steps = dict(num_inference_steps=3)
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    assert np.array_equal(pixels(pipe(generator=generators, **steps)), images[name]), name
    assert len(pipe(generator=torch.Generator().manual_seed(0), batch_size=2, output_type='pil', **steps).images) == 2
    assert np.array_equal(pixels(pipe(generator=torch.Generator().manual_seed(0), **steps))[0], images[name][0])
    torch.manual_seed(5)
    global_ones = pixels(pipe(batch_size=2, **steps))
    torch.manual_seed(5)
    assert np.array_equal(pixels(pipe(batch_size=2, **steps)), global_ones)
    as_np = pipe(seeds=range(3), output_type='np', **steps).images
    assert as_np.dtype == np.float32 and np.array_equal((as_np * 255).round().squeeze(), images[name].astype(np.float32).squeeze())
    (as_pt,) = pipe(seeds=range(3), output_type='pt', return_dict=False, images_per_batch=2 if name == 'edm2' else 32, **steps)
    assert torch.equal(as_pt.permute(0, 2, 3, 1), torch.from_numpy(as_np))
    assert pipe(seeds=[0], output_type='latent', **steps).images.shape == (1, pipe.unet.net.img_channels, 8, 8)
    noise = torch.randn([2, pipe.unet.net.img_channels, 8, 8])
    assert np.array_equal(*(pixels(pipe(latents=noise, seeds=[1, 2], **steps)) for _ in range(2)))
    if pipe.unet.net.label_dim:
        assert np.array_equal(pixels(pipe(class_labels=np.int64(2), seeds=range(3), **steps)), pixels(pipe(
            class_labels=torch.tensor([2, 2, 2]), seeds=range(3), **steps)))
    else:
        refused('has no classes', pipe, class_labels=0)
    if name != 'guided':
        refused('needs a guiding network', pipe, guidance_scale=3, seeds=[0])
    refused('is none of pil, np, pt, latent', pipe, output_type='jpg')
    refused('how many images?', pipe, seeds=[0], batch_size=2)
    refused('is no option of the sampler', pipe, sampler='edm', eta=0.5)
    pipe.save_pretrained(f'{ROOT}/saved-{name}')
    again = load(f'saved-{name}', custom_pipeline=f'{ROOT}/saved-{name}')
    assert np.array_equal(pixels(again(seeds=range(3), **steps)), images[name]), name
    assert sorted(os.listdir(f'{ROOT}/saved-{name}')) == sorted(os.listdir(f'{ROOT}/{name}'))
    assert ROOT not in open(f'{ROOT}/saved-{name}/model_index.json').read()

if 'edm2' in NAMES:
    pipe = pipes['edm2']
    images['classes'] = pixels(pipe(class_labels=['owls', 'cats', 2], seeds=range(3), num_inference_steps=3))
    refused("class 'dogs' is not in the data set pets", pipe, class_labels='dogs')
    refused('class_labels=3 is no label', pipe, class_labels=3)

euler = dict(sampler='ablation', solver='euler')
for name in {'edm2', 'edm', 'latents', 'guided'} & {*NAMES}:
    pipe = pipes[name]
    assert pipe.scheduler is None
    steps = dict(num_inference_steps=8)
    same(f'{name} EDMEuler', pipe, diffusers.EDMEulerScheduler, euler, {}, **steps)
    same(f'{name} EDMDPMSolverMultistep', pipe, diffusers.EDMDPMSolverMultistepScheduler, dict(sampler='dpmpp-2m'), {}, **steps)
if 'edm2' in NAMES:                                                 # of other levels: to the same images with more steps
    pipe = pipes['edm2']
    for kind in ('DDIMScheduler', 'DPMSolverMultistepScheduler', 'EulerDiscreteScheduler'):
        same(f'near {kind}', pipe, getattr(diffusers, kind), dict(num_inference_steps=32), dict(num_inference_steps=100))
    pipe.scheduler = diffusers.EDMEulerScheduler()
    refused('sampler=edm has no meaning with a scheduler', pipe, sampler='edm')
    refused('has no meaning for EDMEulerScheduler', pipe, solver='heun')
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    refused('is no scheduler that this pipeline knows', pipe)
    pipe.scheduler = pipe.make_scheduler(diffusers.EDMEulerScheduler)
    pipe.save_pretrained(f'{ROOT}/saved-scheduler')
    again = load('saved-scheduler')
    assert type(again.scheduler).__name__ == 'EDMEulerScheduler'
    assert np.array_equal(*(pixels(one(seeds=[1], num_inference_steps=4)) for one in (pipe, again)))
for name in {'adm', 'ddpm'} & {*NAMES}:
    pipe = pipes[name]
    for eta in (0.0, 0.5):
        same(f'{name} DDIM eta={eta}', pipe, diffusers.DDIMScheduler,
             dict(sampler='ddim', num_inference_steps='ddim10', clip=name == 'adm'),
             dict(num_inference_steps=10, use_clipped_model_output=True), eta=eta)
    same(f'{name} DDPM', pipe, diffusers.DDPMScheduler, {}, {})
    if name == 'adm':                                               # which takes any level
        same('adm EDMDPMSolverMultistep', pipe, diffusers.EDMDPMSolverMultistepScheduler, dict(sampler='dpmpp-2m'), {},
             num_inference_steps=8)
    pipe.scheduler = diffusers.DDIMScheduler()
    refused('the scheduler has other noise than the network', pipe, num_inference_steps=2)

if 'latents' in NAMES:                                              # without an autoencoder in the folder
    shutil.copytree(f'{ROOT}/latents', f'{ROOT}/bare')
    shutil.rmtree(f'{ROOT}/bare/vae')
    index = json.loads(open(f'{ROOT}/bare/model_index.json').read())
    open(f'{ROOT}/bare/model_index.json', 'w').write(json.dumps(index | dict(vae=[None, None])))
    pipe = load('bare')
    refused('autoencoder', pipe, num_inference_steps=3)
    pipe.vae = pipes['latents'].vae
    assert np.array_equal(pixels(pipe(seeds=range(3), num_inference_steps=3)), images['latents'])
    pipe = load('bare', vae=pipes['latents'].vae)
    assert np.array_equal(pixels(pipe(seeds=range(3), num_inference_steps=3)), images['latents'])

exec(open(f'{ROOT}/page.py').read(), names := {})                    # docs/diffusers.md
assert len(names['images']) == 4

weights = f'{ROOT}/saved-{NAMES[0]}/unet/diffusion_pytorch_model.safetensors'
state = safetensors.torch.load_file(weights)
del state[sorted(state)[0]]
safetensors.torch.save_file(state, weights, {'format': 'pt'})
refused('do not fit', load, f'saved-{NAMES[0]}')
refused('trust_remote_code', DiffusionPipeline.from_pretrained, f'{ROOT}/{NAMES[0]}')
assert not {*OURS} & {name.partition('.')[0] for name in sys.modules}
np.savez(f'{ROOT}/images.npz', **images)
open(f'{ROOT}/errors.json', 'w').write(json.dumps(errors))
