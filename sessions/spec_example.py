"""The text of ``train.example.yaml``, for people who cannot make a YAML file: renamed, it starts training."""

# Lines with one # are keys with their defaults: without the # they say what an empty file says. ## are remarks.
EXAMPLE = """\
## Rename this file to train.yaml (or copy it under that name): training starts.
## As it is, everything is decided for you. To decide something yourself, remove the # in front of it.

## The words to use
#instance: auto         # the word that will mean your subject, like zwx. auto: what your pictures' names share;
#                       # filename: each picture's own name, for several subjects in one model
#class: auto            # what it is: person, dog, car ...
#concept: auto          # object | face | style
#captions: auto         # true | false: teach with the texts in captions/
#caption_dropout: 0.0   # how often a picture is taught without its text, like 0.1
#caption_shuffle: false # true: what stands between commas changes places; the first part stays in front
#name: null             # what the model's file is called; null: like this folder

## What to train
#base: auto             # miniature | sd15 | sd21 | sd21-768 | sdxl | flux-dev | flux-schnell
#                       # | the name of a file or folder under Models/
#method: auto           # dreambooth (two stages) | finetune (both together) | lora | dora; auto: lora for SDXL and Flux
#resolution: auto       # pixels, like 512
#crop: smart            # smart | centre | off: what the pictures are cut around; for single pictures see below
#buckets: false         # true: wide and tall pictures train as such (up to 2:1) instead of as squares
#text_encoder: {steps: auto, learning_rate: auto, unet: trained}   # steps: 0 leaves it as it is
#unet: {steps: auto, learning_rate: auto}                          # steps: 1500, or "150/image"
#lora: {rank: 16, alpha: 16, convolutions: auto}   # convolutions: true learns new shapes better, in a larger file
#prior: {images: 0, weight: 1.0, caption_dropout: auto, target: auto}   # class pictures against forgetting; those that
#                       # are missing are drawn into concept_images/. caption_dropout: how often one has no words;
#                       # target: picture: the class pictures | base: what the base predicts for them, forgets less

## How to train
#optimizer: auto
#schedule: linear       # linear | cosine | constant
#batch_size: auto       # pictures a step; auto: 1, and more for the miniatures
#precision: auto        # fp32 | fp16 | bf16
#memory: auto
#compile: false         # true: minutes to compile at the start, and faster steps after them; for long runs on a GPU
#seed: 7
#offset_noise: auto     # 0.1 for styles
#min_snr: null
#ema: false
#vae: auto              # another VAE: a name of `fastsd models list`, or a file or folder under Models/

## What to see and keep
#checkpoint_every: 10min   # or a number of steps
#sample_every: auto        # pictures in previews/ while it trains: a number of steps, 0 for none
#validation: auto          # pictures held out to measure with: a number, 0 for none; auto: a tenth, from 40 pictures on
#prompts: auto             # what they show, like ["a photo of zwx dog", "zwx dog on the moon"]
#save_every: 0             # a number of unet steps: a model of every so many, in runs/
#save_from: 0              # the unet step of the first of them; 0: save_every
#continue: null            # last, or the name of a run or of a model in this folder: more steps from there
#publish: true             # into the WebUI when done
#start: auto               # now: do not wait until all pictures have arrived

## What the crops shall show: write a file crop.txt into this folder, a wish a line. previews/crops.jpg shows them.
##   subject: dog                    for every picture: a thing, or faces, centre, segment (a network)
##   exclude: logo, sign             never these
##   IMG_1.jpg: 120 40 900 820       for one picture: left, top, right, bottom in pixels
##   IMG_2.jpg: 10% 5% 80% 90%       or in percent
##   IMG_3.jpg: centre               or a thing, faces, segment
"""
