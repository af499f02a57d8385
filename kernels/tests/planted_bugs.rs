//! Bugs planted into copies of the CUDA kernels, each of which the checks must notice: a suite that passes proves
//! something only if it can fail.
//!
//! A bug runs in a process of its own, so that one that ends the process counts as caught too.

#![expect(clippy::print_stdout, reason = "processes talk through it, and a run tells what was caught how")]

use std::path::{Path, PathBuf};
use std::process::Command;

use ctq_kernels::check::{Area, Extent, Size, compare};
use ctq_kernels::cpu::Cpu;
use ctq_kernels::cuda::emulated::{Dense, Emulated, Schedule, Warpgroups};
use ctq_kernels::cuda::{AttentionPath, Cuda, LinearPath};
use rayon::prelude::*;

#[path = "planted/attention_hopper.rs"]
mod attention_hopper;

/// One wrong line.
struct Bug {
    /// What is wrong.
    what: &'static str,
    /// Where it must show.
    area: Area,
    file: &'static str,
    /// The line as it is: stands in the file exactly once.
    line: &'static str,
    planted: &'static str,
}

const BUGS: &[Bug] = &[
    Bug {
        what: "a wait for copies that is too weak",
        area: Area::Products,
        file: "tensor_product.cuh",
        line: "        copy_wait<1>();\n        sync_block();\n        u32 stage",
        planted: "        copy_wait<2>();\n        sync_block();\n        u32 stage",
    },
    Bug {
        what: "no barrier between a copy and its use",
        area: Area::Products,
        file: "tensor_product.cuh",
        line: "        copy_wait<1>();\n        sync_block();\n        u32 stage",
        planted: "        copy_wait<1>();\n        u32 stage",
    },
    Bug {
        what: "a stage overwritten while others read it",
        area: Area::Products,
        file: "tensor_product.cuh",
        line: "            }\n        }\n        sync_block();\n    }",
        planted: "            }\n        }\n    }",
    },
    Bug {
        what: "chunks exchanged on one side only",
        area: Area::Products,
        file: "tensor_product.cuh",
        line: "load_matrices(b, stage + row * 128 + (chunk ^ row % 8) * 16);",
        planted: "load_matrices(b, stage + row * 128 + chunk * 16);",
    },
    Bug {
        what: "the scale of the upper rows for all",
        area: Area::Products,
        file: "tensor_product.cuh",
        line: "ahead.scales[s][high] = scale_ahead<ARITHMETIC>(m, at);",
        planted: "ahead.scales[s][high] = scale_ahead<ARITHMETIC>(m, walk.place[0].base + (u64)walk.group * walk.place[0].step);",
    },
    Bug {
        what: "a store beyond the last token",
        area: Area::Products,
        file: "linear_bf16.cu",
        line: "if (wanted && token < p.m)",
        planted: "if (wanted)",
    },
    Bug {
        what: "a thread that leaves before a barrier",
        area: Area::Products,
        file: "linear_bf16.cu",
        line: "    float sums[16][4];\n    product_tile",
        planted: "    float sums[16][4];\n    if (thread() == 7) return;\n    product_tile",
    },
    Bug {
        what: "codes used before they are there",
        area: Area::Products,
        file: "linear_codes.cu",
        line: "copy_wait<CODES_STAGES - 2>();",
        planted: "copy_wait<CODES_STAGES - 1>();",
    },
    Bug {
        what: "codes overwritten while others read them",
        area: Area::Products,
        file: "linear_codes.cu",
        line: "        copy_wait<CODES_STAGES - 2>();\n        sync_block();\n",
        planted: "        copy_wait<CODES_STAGES - 2>();\n",
    },
    Bug {
        what: "a step's chunks turned by a sum",
        area: Area::Products,
        file: "linear_codes.cu",
        line: "(place ^ 32 * s)",
        planted: "(place + 32 * s)",
    },
    Bug {
        what: "the upper rows' bytes for the lower",
        area: Area::Products,
        file: "code_sums.cuh",
        line: "r & 1 ? 0x7351 : 0x6240",
        planted: "0x7351",
    },
    Bug {
        what: "codes behind the last k in the sums of a row",
        area: Area::Products,
        file: "code_sums.cuh",
        line: "if (first + 16 <= k) return 0x01010101u;",
        planted: "if (first <= k) return 0x01010101u;",
    },
    Bug {
        what: "a segment that goes on with the sums before it",
        area: Area::Products,
        file: "linear_codes.cu",
        line: "            if (start < m.k) begin_segment<ARITHMETIC>(m, tile, start);\n",
        planted: "\n",
    },
    Bug {
        what: "fp8 weights that stay as small as they came",
        area: Area::Products,
        file: "linear_codes.cu",
        line: "scales[a] = scales[a] * 256.0f;",
        planted: "scales[a] = scales[a];",
    },
    Bug {
        what: "no meeting between writing and reading a warp's rows",
        area: Area::Products,
        file: "decode.cu",
        line: "        sync_warp();\n        UNROLL\n",
        planted: "        UNROLL\n",
    },
    Bug {
        what: "a warp's rows overwritten while others read them",
        area: Area::Products,
        file: "decode.cu",
        line: "        sync_warp();\n    }\n}",
        planted: "    }\n}",
    },
    Bug {
        what: "a key too few",
        area: Area::Attention,
        file: "attention_softmax.cuh",
        line: "bool seen = key <= query &&",
        planted: "bool seen = key < query &&",
    },
    Bug {
        what: "queries taken for those of the window's first rows",
        area: Area::Attention,
        file: "attention.cuh",
        line: "(u64)item.row + (position - item.begin)",
        planted: "(u64)item.row + position",
    },
    Bug {
        what: "a denominator that is not rescaled",
        area: Area::Attention,
        file: "attention_softmax.cuh",
        line: "            running.total[row] *= shrink.factor[row];\n",
        planted: "",
    },
    Bug {
        what: "keys overwritten while others read them",
        area: Area::Attention,
        file: "attention_bf16.cu",
        line: "        score(scores, queries, query_tile, key_tile);\n        sync_block();",
        planted: "        score(scores, queries, query_tile, key_tile);",
    },
    Bug {
        what: "values used before they are there",
        area: Area::Attention,
        file: "attention_bf16.cu",
        line: "exponentials(scores, queries.running));\n        copy_wait<1>();",
        planted: "exponentials(scores, queries.running));\n        copy_wait<2>();",
    },
    Bug {
        what: "a level of a sum lost",
        area: Area::Rows,
        file: "norm.cu",
        line: "levels[1] += levels[0];",
        planted: "levels[1] = levels[0];",
    },
    Bug {
        what: "the later of equal experts",
        area: Area::Rows,
        file: "route.cu",
        line: "if (key < before) best = most(best, key);",
        planted: "if (key <= before) best = most(best, key);",
    },
    Bug {
        what: "a rotation the wrong way",
        area: Area::Rows,
        file: "elementwise.cu",
        line: "*first = a * cosine - b * sine;",
        planted: "*first = a * cosine + b * sine;",
    },
    Bug {
        what: "a tile's sum of exponentials that misses its last logit",
        area: Area::Heads,
        file: "head_fold.cuh",
        line: "for (u32 i = 0; i < width; i++) sum += (double)logits[i];",
        planted: "for (u32 i = 0; i + 1 < width; i++) sum += (double)logits[i];",
    },
    Bug {
        what: "a row summed before all of it is there",
        area: Area::Fused,
        file: "row.cuh",
        line: "    copy_wait<0>();\n    sync_block();\n",
        planted: "    copy_wait<0>();\n",
    },
    Bug {
        what: "steps of a sum folded before all warps have theirs",
        area: Area::Fused,
        file: "row.cuh",
        line: "    sync_block();\n    float first",
        planted: "    float first",
    },
    Bug {
        what: "a row overwritten while others sum it",
        area: Area::Fused,
        file: "quantize.cu",
        line: "    // Others may still be summing the row.\n    sync_block();\n",
        planted: "",
    },
    Bug {
        what: "a row of large numbers taken for one that is not finite",
        area: Area::Fused,
        file: "quantize.cu",
        line: "bad |= !is_finite(bits_of(row_values()[i]));",
        planted: "bad = 1;",
    },
    Bug {
        what: "a row's range found by some of its warps",
        area: Area::Fused,
        file: "quantize.cu",
        line: "for (u32 i = 0; i < ROW_WARPS; i++) {",
        planted: "for (u32 i = 0; i + 1 < ROW_WARPS; i++) {",
    },
    Bug {
        what: "a gate multiplied with its neighbour's factor",
        area: Area::Fused,
        file: "quantize.cu",
        line: "silu(float_of(g.y)) * float_of(u.y)",
        planted: "silu(float_of(g.y)) * float_of(u.x)",
    },
    Bug {
        what: "a sum that is overwritten",
        area: Area::Fused,
        file: "linear_bf16.cu",
        line: "if (p.added) sum = p.added[(u64)token * p.added_stride + column] + sum;",
        planted: "",
    },
    Bug {
        what: "a bias that is added last",
        area: Area::Fused,
        file: "linear_bf16.cu",
        line: "            if (biased) sum += bias;\n            if (p.added) sum = p.added[(u64)token * p.added_stride + column] + sum;",
        planted: "            if (p.added) sum = p.added[(u64)token * p.added_stride + column] + sum;\n            if (biased) sum += bias;",
    },
    Bug {
        what: "one of four elements that is not looked at",
        area: Area::Rows,
        file: "elementwise.cu",
        line: "is_finite(q.z) && is_finite(q.w)",
        planted: "is_finite(q.z)",
    },
    Bug {
        what: "a scale of zero left as it is",
        area: Area::Activations,
        file: "quantize.cu",
        line: "return scale == 0.0f ? float_of(0x34000000u) : scale;",
        planted: "return scale;",
    },
];

/// Bugs that show where warpgroups multiply.
const BUGS_ON_WARPGROUPS: &[Bug] = &[
    Bug {
        what: "a phase taken for the one before",
        area: Area::Products,
        file: "hopper_product.cuh",
        line: "turn.stage = 0, turn.parity ^= 1;",
        planted: "turn.stage = 0;",
    },
    Bug {
        what: "codes that were not announced",
        area: Area::Products,
        file: "hopper_product.cuh",
        line: "u32 bytes = HOPPER_TOKENS * 128 + HOPPER_CONSUMERS * F::CODES_ROOM;",
        planted: "u32 bytes = HOPPER_TOKENS * 128 + F::CODES_ROOM;",
    },
    Bug {
        what: "a stage filled while it is read",
        area: Area::Products,
        file: "hopper_product.cuh",
        line: "            barrier_wait(empty<R>(turn), turn.parity ^ 1);\n",
        planted: "",
    },
    Bug {
        what: "a wait for products that is too weak",
        area: Area::Products,
        file: "hopper_product.cuh",
        line: "wgmma_wait<1>();",
        planted: "wgmma_wait<2>();",
    },
    Bug {
        what: "sums read while they are made",
        area: Area::Products,
        file: "hopper_product.cuh",
        line: "    wgmma_wait<0>();\n",
        planted: "",
    },
    Bug {
        what: "a step of k too far",
        area: Area::Products,
        file: "hopper_product.cuh",
        line: "tokens + 2 * s",
        planted: "tokens + 4 * s",
    },
    Bug {
        what: "a stage freed by the first warps that are done",
        area: Area::Products,
        file: "hopper_product.cuh",
        line: "barrier_init(empty<R>(turn), HOPPER_CONSUMERS * WARPGROUP / WARP);",
        planted: "barrier_init(empty<R>(turn), HOPPER_CONSUMERS);",
    },
    Bug {
        what: "a product without the fence before it",
        area: Area::Products,
        file: "hopper_product.cuh",
        line: "    wgmma_fence();\n",
        planted: "",
    },
    Bug {
        what: "stages that break the pattern of the exchanged chunks",
        area: Area::Products,
        file: "hopper_product.cuh",
        line: "+ 1023) / 1024 * 1024",
        planted: "+ 511) / 512 * 512",
    },
    Bug {
        what: "codes read before they are there",
        area: Area::Products,
        file: "hopper_product.cuh",
        line: "    barrier_wait(full<R>(turn), turn.parity);\n    decode_stage<F, R>(p, stage_place<R>(turn), rows, a);\n    u32",
        planted: "    decode_stage<F, R>(p, stage_place<R>(turn), rows, a);\n    barrier_wait(full<R>(turn), turn.parity);\n    u32",
    },
    Bug {
        what: "the first scale of a stage for all of it",
        area: Area::Products,
        file: "hopper_product.cuh",
        line: "u32 group = s >> shift;",
        planted: "u32 group = 0;",
    },
    Bug {
        what: "scales of the rows beside them",
        area: Area::Products,
        file: "hopper_product.cuh",
        line: "u32 at = group * MATRIX_TILE + rows.row[high];",
        planted: "u32 at = group * MATRIX_TILE + rows.row[0];",
    },
    Bug {
        what: "bytes picked for the wrong register",
        area: Area::Products,
        file: "operands.cuh",
        line: "a[high + 2] = pick_bytes(low_bytes, high_bytes, 0x7362);",
        planted: "a[high + 2] = pick_bytes(low_bytes, high_bytes, 0x6372);",
    },
    Bug {
        what: "staged sums overwritten while others store them",
        area: Area::Products,
        file: "linear_hopper.cu",
        line: "        sync_named(1 + rows.consumer, WARPGROUP);\n        stage_tile",
        planted: "        stage_tile",
    },
    Bug {
        what: "logits of one consumer put where the other's are",
        area: Area::Heads,
        file: "head_hopper.cu",
        line: "float* mine = staged + rows.consumer * MATRIX_TILE;",
        planted: "float* mine = staged;",
    },
    Bug {
        what: "a gate that meets the other consumer's tokens too early",
        area: Area::Fused,
        file: "gate_hopper.cu",
        line: "rows);\n            meet_consumers();\n",
        planted: "rows);\n",
    },
    Bug {
        what: "a round of stages that is not turned",
        area: Area::Products,
        file: "linear_codes_hopper.cu",
        line: "ring.stage = 0, ring.round ^= 1;",
        planted: "ring.stage = 0;",
    },
    Bug {
        what: "fewer bytes announced than come",
        area: Area::Products,
        file: "linear_codes_hopper.cu",
        line: "barrier_expect(full, CodesRoom<TOKENS>::BYTES);",
        planted: "barrier_expect(full, CodesRoom<TOKENS>::BYTES / 2);",
    },
    Bug {
        what: "a stage filled while it is read",
        area: Area::Products,
        file: "linear_codes_hopper.cu",
        line: "            barrier_wait(codes_empty<TOKENS>(ring.stage), ring.round ^ 1);\n",
        planted: "\n",
    },
    Bug {
        what: "a stage given back before its products are done",
        area: Area::Products,
        file: "linear_codes_hopper.cu",
        line: "            wgmma_wait<1>();\n",
        planted: "            wgmma_wait<2>();\n",
    },
    Bug {
        what: "a stage given back by the first warp that left it",
        area: Area::Products,
        file: "linear_codes_hopper.cu",
        line: "barrier_init(codes_empty<TOKENS>(i), 8);",
        planted: "barrier_init(codes_empty<TOKENS>(i), 1);",
    },
    Bug {
        what: "sums taken before the last products are done",
        area: Area::Products,
        file: "linear_codes_hopper.cu",
        line: "    wgmma_wait<0>();\n    wgmma_sums(sums.sums);\n    leave_stage<256>(before);",
        planted: "    wgmma_wait<1>();\n    wgmma_sums(sums.sums);\n    leave_stage<256>(before);",
    },
    Bug {
        what: "steps of 64 bytes",
        area: Area::Products,
        file: "linear_codes_hopper.cu",
        line: "step_product<256>(sums.sums, a[set][s], matrix_rows(stage + 32 * s));",
        planted: "step_product<256>(sums.sums, a[set][s], matrix_rows(stage + 64 * s % 128));",
    },
    Bug {
        what: "a scale of the segment before",
        area: Area::Products,
        file: "linear_codes_hopper.cu",
        line: "(u64)(start / m.group) * place.step",
        planted: "(u64)((start + m.group - 1) / m.group / 2) * place.step",
    },
    Bug {
        what: "tokens of the block before",
        area: Area::Products,
        file: "linear_codes_hopper.cu",
        line: "u32 first_token = block_place(args, index).token_block * TOKENS;",
        planted: "u32 first_token = 0;",
    },
    Bug {
        what: "fp8 sums on warpgroups that stay as small as they came",
        area: Area::Products,
        file: "linear_codes_hopper.cu",
        line: "scales[h] = scales[h] * 256.0f;",
        planted: "scales[h] = scales[h] * 1.0f;",
    },
];

/// Which kernels serve where several can.
#[derive(Clone, Copy, Debug)]
enum Engine {
    /// Those of every device.
    Plain,
    /// Those on warpgroups.
    Warpgroups,
}

/// Names the library that a child process is to check, the area, by its place among all, and whether warpgroups serve.
const LIBRARY: &str = "CTQ_PLANTED_LIBRARY";
const AREA: &str = "CTQ_PLANTED_AREA";
const WARPGROUPS: &str = "CTQ_PLANTED_WARPGROUPS";
/// What a child prints when it has noticed something.
const CAUGHT: &str = "caught:";
/// What a child prints when everything is sound.
const SOUND: &str = "everything is sound";

#[test]
fn every_planted_bug_is_caught() {
    assert!(BUGS.len() >= 10);
    let folder = tempfile::tempdir().expect("a folder");
    let plain = BUGS.iter().map(|bug| (bug, Engine::Plain));
    let all: Vec<(&Bug, Engine)> = plain
        .chain(BUGS_ON_WARPGROUPS.iter().chain(attention_hopper::BUGS).map(|bug| (bug, Engine::Warpgroups)))
        .collect();
    let missed: Vec<&str> = all
        .par_iter()
        .enumerate()
        .filter(|(index, (bug, engine))| {
            let library = plant(bug, &folder.path().join(index.to_string()));
            let told = check_in_a_process(&library, bug.area, *engine);
            println!("{}: {}", bug.what, told.lines().find(|line| line.contains(CAUGHT)).unwrap_or(""));
            told.contains(SOUND)
        })
        .map(|(_, (bug, _))| bug.what)
        .collect();
    assert!(missed.is_empty(), "not caught: {missed:#?}");
}

/// Without a bug the same machinery finds nothing.
#[test]
fn unchanged_kernels_are_sound() {
    let folder = tempfile::tempdir().expect("a folder");
    let bug = Bug {
        what: "nothing",
        area: Area::Rows,
        file: "norm.cu",
        line: "#include \"norm.cuh\"",
        planted: "#include \"norm.cuh\"",
    };
    let library = plant(&bug, folder.path());
    for (area, engine) in [(bug.area, Engine::Plain), (Area::Products, Engine::Warpgroups)] {
        let told = check_in_a_process(&library, area, engine);
        assert!(told.contains(SOUND), "{engine:?}: {told}");
    }
}

/// The body of the child process: does nothing where it is not one.
#[test]
fn check_one_library() {
    let Some(library) = std::env::var_os(LIBRARY) else { return };
    let place: usize = std::env::var(AREA).expect("an area").parse().expect("its place");
    let areas = &Area::ALL[place..=place];
    for schedule in Schedule::ALL {
        let device = Emulated::new(schedule).with_dense_product(Dense::Present);
        let device = device.with_kernels(Path::new(&library)).expect("a build of the emulation");
        let cuda = match std::env::var_os(WARPGROUPS) {
            None => Cuda::new(device),
            Some(_) => {
                let cuda = Cuda::new(device.with_warpgroups(Warpgroups::Present));
                cuda.with_linears(Some(LinearPath::Hopper)).with_attention(Some(AttentionPath::Hopper))
            }
        };
        let findings = compare(&cuda, &Cpu::detect(), areas, Size::Small, Extent::FirstFailure);
        if let Some(found) = findings.iter().find(|finding| finding.failure.is_some()) {
            let failure = found.failure.as_deref().unwrap_or_default();
            println!("{CAUGHT} under {schedule:?}, {} {}: {failure}", found.operation, found.case);
            return;
        }
    }
    println!("{SOUND}");
}

fn check_in_a_process(library: &Path, area: Area, engine: Engine) -> String {
    let place = Area::ALL.iter().position(|of| *of == area).expect("one of all");
    let mut child = Command::new(std::env::current_exe().expect("this test"));
    child
        .args(["--exact", "check_one_library", "--nocapture"])
        .env(LIBRARY, library)
        .env(AREA, place.to_string());
    if matches!(engine, Engine::Warpgroups) {
        child.env(WARPGROUPS, "1");
    }
    let output = child.output().expect("a child process");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Copies the kernels with the bug into `folder` and builds them.
fn plant(bug: &Bug, folder: &Path) -> PathBuf {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("cuda");
    let copy = folder.join("cuda");
    copy_folder(&sources, &copy);
    let file = copy.join(bug.file);
    let text = std::fs::read_to_string(&file).expect("a kernel");
    assert_eq!(text.matches(bug.line).count(), 1, "`{}` stands once in {}", bug.line, bug.file);
    std::fs::write(&file, text.replace(bug.line, bug.planted)).expect("written");
    let library = folder.join("libkernels.so");
    let compiled = Command::new(std::env::var_os("CXX").unwrap_or_else(|| "c++".into()))
        .args(["-std=c++17", "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-o"])
        .arg(&library)
        .arg(copy.join("emulation/simt.cpp"))
        .output()
        .expect("a C++ compiler");
    assert!(compiled.status.success(), "{}: {}", bug.what, String::from_utf8_lossy(&compiled.stderr));
    library
}

fn copy_folder(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).expect("a folder");
    for entry in std::fs::read_dir(from).expect("the kernels") {
        let path = entry.expect("an entry").path();
        let target = to.join(path.file_name().expect("a name"));
        if path.is_dir() {
            copy_folder(&path, &target);
        } else {
            std::fs::copy(&path, &target).expect("copied");
        }
    }
}
