//! Every storage format there is comes back byte for byte: the goldens of each format, the families, the fixtures.

mod checkpoints;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use checkpoints::{Tiny, assert_lossless, assets, convert_to, goldens, open, options};
use ctq_container::{Container, Origin};
use ctq_convert::RestoredSource;
use ctq_model::{Checkpoint, Inventory, TensorSource};
use rayon::prelude::*;

/// What real quantizers write is held by the tiles alone; anything kept beside them would hide a wrong codec.
fn assert_nothing_kept_beside(container: &Container) {
    for tensor in container.manifest().parts.iter().flat_map(|part| &part.tensors) {
        match tensor.origin {
            Origin::Stored | Origin::Tiles => {}
            Origin::Original | Origin::TilesWithExceptions => {
                panic!("{}: {} is {:?}", container.root().display(), tensor.name, tensor.origin)
            }
        }
    }
}

#[test]
fn every_golden_of_every_format_comes_back() {
    let goldens = goldens();
    assert!(goldens.len() > 80);
    for golden in &goldens {
        let (n, k) = golden.shape;
        let tensors: Vec<_> =
            golden.tensors.iter().map(|(name, stored)| (name.as_str(), stored.clone())).collect();
        let tiny = Tiny::new(n, k, &golden.group, &tensors).write();
        let inventory = Checkpoint::open(tiny.path()).and_then(|source| Inventory::read(&source, &[]));
        match inventory {
            Ok(_) => assert_nothing_kept_beside(&assert_lossless(tiny.path(), 2)),
            Err(error) => {
                let message = error.to_string();
                let refused = message.contains("is mxfp6-pack-quantized")
                    || message.contains("weight_global_scale` is missing");
                assert!(refused, "{}: {message}", golden.name);
            }
        }
    }
}

fn models_below(folder: &str) -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../golden").join(folder);
    let mut models: Vec<PathBuf> =
        std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    models.retain(|path| path.join("config.json").is_file());
    models.sort();
    models
}

#[test]
fn every_family_and_bundled_model_comes_back() {
    for model in models_below("families").into_iter().chain(models_below("bundled")) {
        let container = assert_lossless(&model, 3);
        assert_nothing_kept_beside(&container);
        let accounting = &container.manifest().accounting;
        assert!(accounting.container.unwrap().bits > accounting.layer.bits);
    }
}

#[test]
fn every_fixture_comes_back() {
    let fixtures = assets("fixtures");
    assert!(fixtures.is_empty() || fixtures.len() == 18);
    for fixture in fixtures {
        assert_nothing_kept_beside(&assert_lossless(&fixture, 4));
    }
}

#[test]
fn the_bits_do_not_depend_on_the_number_of_threads() {
    let source = Tiny::int4(200, 96).write();
    let folder = tempfile::tempdir().unwrap();
    let bytes = |threads: usize| {
        let out = folder.path().join(threads.to_string());
        let container = convert_to(source.path(), &out, &options(threads)).unwrap();
        container.manifest().parts.iter().map(|part| part.sha256).collect::<Vec<_>>()
    };
    let one = bytes(1);
    for threads in [2, 3, 7] {
        assert_eq!(bytes(threads), one);
    }
}

#[test]
fn originals_can_be_asked_for_from_every_thread_of_the_pool() {
    let source = Tiny::int4(200, 96).write();
    let folder = tempfile::tempdir().unwrap();
    let container = convert_to(source.path(), &folder.path().join("out"), &options(2)).unwrap();
    let restored = RestoredSource::new(Arc::new(container)).unwrap();
    let (checkpoint, _) = open(source.path());
    let names: Vec<&str> = restored.names().into_iter().cycle().take(300).collect();
    names.par_iter().for_each(|name| {
        let (a, b) = (restored.tensor(name).unwrap().unwrap(), checkpoint.tensor(name).unwrap().unwrap());
        assert!(a.bytes == b.bytes);
    });
}
