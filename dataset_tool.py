"""Make data sets: convert pictures, encode them as latents, decode latents, inspect."""

import os

import click

from dnnlib import UserError, cli, options, util
from training.data import imagenet, transforms

DEFAULT_VAE = 'stabilityai/sd-vae-ft-mse'


@click.group(cls=cli.Group)
def main():
    """Make data sets for training: a .zip (or folder) of equal images and their dataset.json.

    \b
    python dataset_tool.py convert --source=digits --dest=datasets/digits.zip
    python dataset_tool.py convert --source=downloads/imagenet/train --dest=datasets/img256.zip \\
        --resolution=256x256 --transform=center-crop-dhariwal
    python dataset_tool.py encode --source=datasets/img256.zip --dest=datasets/img256-sd.zip
    python dataset_tool.py inspect --source=datasets/img256.zip
    """


max_images_option = options.count('--max-images', None, 'Use at most this many, the first ones')
# Of the commands that run the autoencoder.
latent_options = options.together(
    options.pictures,
    max_images_option,
    options.integer('--batch', 16, 'Images that go through the autoencoder together'),
    options.choice('--precision', 'fp32', 'Precision of the autoencoder',
                   ['fp32', 'fp16', 'bf16']))


@main.command()
@options.conversion(transforms.NAMES)
@max_images_option
@options.text('LIST', '--class_labels', 'Classes to take, in the order of their new labels: '
              'names, wnids or numbers, e.g. cat,dog or 171,182,198; a name counts first')
@options.integer('--nums', None, 'Images to draw of each class; 0 for all', 0)
@click.option('--sim_name', metavar='sim1|sim2|sim3',
              type=click.Choice(list(imagenet.SIMILARITY_LEVELS), case_sensitive=False),
              help='Similarity level of the multi-source study; without --class_labels, takes the '
                   "level's ten classes")
@options.integer('--seed', 0, 'Which images --nums draws', 0)
def convert(source, dest, overwrite, reading, rules, class_labels, nums, sim_name, seed,
            max_images):
    """Make a data set of pictures.

    Images have even sides, and all the same ones. Pictures of another shape than --resolution are
    refused unless --transform says how they are cropped, or --transform=stretch that they are
    squashed; --transform=crop keeps the largest part of that shape. Pictures that are all gray
    make images of one channel; what is transparent is laid on white, unless --channels=4.

    --source is a folder or .zip of images (labels from dataset.json, else from top-level folders,
    or, where there is only one, from the folders in it),
    cifar-10-python.tar.gz, cifar-100-python.tar.gz or their unpacked folders, MNIST
    train-images-idx3-ubyte.gz, an LSUN *_lmdb folder, a .txt list of image paths (a tab and a
    number after each path give labels), an .npz of images and labels (arr_0, image, images,
    x_train, train_images, ...; FILE.npz:NAME or --key names another array), an .npy, a folder of
    <class>.npy, a data set of Hugging Face (a .parquet, a folder of them or of save_to_disk, with
    pyarrow installed; hf:NAME or hf:NAME:SPLIT of the hub, which needs the network and the
    package datasets), the word digits, or several of these joined by commas: classes of the same
    name are then one class.

    Classes are numbered as in ImageNet if their folders are wnids, else by their place in the
    sorted list of folders; those named by number are in its order. New labels count from 0;
    dataset.json keeps the original numbers as "classes", so that --class=171 names the same class
    everywhere. What --nums draws of a class depends on the seed and its number alone.

    \b
    python dataset_tool.py convert --source=cifar-10-python.tar.gz --dest=datasets/cifar10.zip
    python dataset_tool.py convert --source=downloads/imagenet/train \\
        --dest=datasets/sim3-10c-1000.zip --resolution=256x256 --transform=center-crop-dhariwal \\
        --sim_name=sim3 --nums=1000
    """
    from training.data import archive, sources
    from training.data.convert import by_class, class_numbers, convert, everything
    archive.check_destination(dest, overwrite)
    opened = sources.open_source(source, **reading)
    if class_labels is not None:
        class_labels = class_numbers(opened, class_labels)
    if sim_name is not None:
        level = imagenet.SIMILARITY_LEVELS[sim_name]
        if opened.wnids is None and len(opened.classes or []) != len(imagenet.classes()):
            raise UserError(f'--sim_name={sim_name} names ImageNet classes, '
                            f'but the folders of {source} are no wnids')
        if outside := set(class_labels or []) - set(level):
            raise UserError(f'--class_labels: {min(outside)} is not of --sim_name={sim_name}: '
                            f'{",".join(map(str, level))}')
        class_labels = class_labels or list(level)
    if class_labels is None and nums is None:
        selection = everything(opened)
    else:
        selection = by_class(opened, class_labels, nums, seed)
    selection = selection.first(max_images)
    converted = convert(opened, selection, dest, overwrite=overwrite, notes={'sim_name': sim_name},
                        **rules)
    print(converted.summary(dest))


@main.command()
@options.text('PATH', '--source', 'Data set of pixels', required=True)
@options.destination
@options.text('NAME|DIR', '--model-url', 'Autoencoder: a hub name[@revision], or a local folder; '
              'the variable SD_VAE sets another default', default=DEFAULT_VAE, envvar='SD_VAE')
@latent_options
def encode(source, dest, model_url, batch, precision, **others):
    """Encode pixels as mean and standard deviation of Stable Diffusion's autoencoder.

    The result is the same for any number of processes.

    \b
    python dataset_tool.py encode --source=datasets/img256.zip --dest=datasets/img256-sd.zip
    torchrun --standalone --nproc_per_node=8 dataset_tool.py encode --source=... --dest=...
    """
    from torch_utils import distributed as dist
    from training import encoders
    from training.data import latents
    dist.init()
    dist.print0(f'Autoencoder: {model_url}')
    encoder = encoders.StabilityVAEEncoder(model_url, batch_size=batch, precision=precision)
    count = latents.encode(source, dest, encoder, batch=batch, **others)
    dist.print0(f'{dest}: {count} images encoded')
    dist.shutdown()


@main.command()
@options.text('ZIP|DIR', '--source', 'Data set of latents', required=True)
@options.destination
@options.text('NAME|DIR', '--model-url',
              'Autoencoder  [default: the one that the data set names]')
@latent_options
def decode(source, dest, **others):
    """Decode latents to pictures (of the mean), with their labels.

    \b
    python dataset_tool.py decode --source=datasets/img256-sd.zip --dest=datasets/img256-out.zip
    """
    from torch_utils import distributed as dist
    from training.data import latents
    dist.init()
    count = latents.decode(source, dest, **others)
    dist.print0(f'{dest}: {count} images decoded')
    dist.shutdown()


@main.command()
@options.text('PATH', '--source', 'Data set of pixels or latents', required=True)
@options.text('PNG', '--dest', 'Contact sheet to write  [default: SOURCE-sheet.png]',
              type=cli.PICTURE)
@options.pictures
@options.count('--max-images', 10000, 'Images over which numbers are taken')
@options.text('FILE', '--json json_path', 'Write the numbers as JSON too',
              type=cli.json_with('measured', 'counts'))
def inspect(source, dest, max_images, json_path):
    """Show what is in a data set, and draw a contact sheet.

    \b
    python dataset_tool.py inspect --source=datasets/digits.zip
    """
    from dnnlib import pictures
    from training.data import report
    from training.data.images import open_dataset
    dataset = open_dataset(source, finite=False)
    dest = dest or os.path.splitext(dataset.path)[0] + '-sheet.png'
    cli.PICTURE.check_path(dest, 'dest')
    summary = report.summarize(dataset, max(max_images, 1))
    kind = 'pixels' if dataset.dtype == 'uint8' else 'latents'
    shape = 'x'.join(map(str, dataset.image_shape))
    print(f'{dataset.path}: {len(dataset)} images, {shape} {kind}')
    for key in ('source', 'transform', 'sim_name', 'encoder'):
        if summary.get(key):
            print(f'{key}: {summary[key]}')
    print('mean', *(f'{x:.3f}' for x in summary['mean']), f'(of {summary["measured"]} images)')
    print('std ', *(f'{x:.3f}' for x in summary['std']))
    if summary['nonfinite']:
        print(f'{summary["nonfinite"]} of the measured images have values that are not finite:',
              *summary['nonfinite_files'], sep='\n    ')
    print(f'{len(summary["counts"])} classes' if dataset.has_labels else 'no labels')
    if dataset.has_labels:
        table = report.class_table(summary['counts'], dataset.classes, dataset.class_names)
        print(*table, sep='\n')
    if json_path:
        util.write_json(json_path, summary)
    images, columns, names = report.contact_sheet(dataset)
    title = f'{dataset.name}: {min(len(images), len(dataset))} of {len(dataset):,} images'
    if names:
        title = pictures.with_classes(dataset.name, len(names), dataset.label_dim)
    pictures.save_image_grid(dest, images, columns, names, title)
    print(f'contact sheet: {dest}')


if __name__ == '__main__':
    main()
