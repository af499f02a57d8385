//! Frequencies and turns of position 2047, against the bits that transformers 5.17 computes
//! (`LlamaRotaryEmbedding(LlamaConfig(..., rope_parameters=...))` on a CPU with torch 2.14).

use ctq_model::rope::{Rope, RopeScaling};
use ctq_reference::rope::Rotation;

struct Case {
    scaling: RopeScaling,
    theta: f64,
    attention_factor: f64,
    inverse_frequencies: &'static [u32],
    cosines: &'static [u32],
    sines: &'static [u32],
}

/// One unit in the last place: torch's power, cosine and sine are not correctly rounded.
fn assert_near(found: f32, expected: u32, what: &str) {
    let distance = i64::from(found.to_bits()) - i64::from(expected);
    assert!(distance.abs() <= 1, "{what}: {found} is not {}", f32::from_bits(expected));
}

fn check(case: &Case) {
    let head_dim = 2 * case.inverse_frequencies.len();
    let rotation = Rotation::new(&Rope { theta: case.theta, scaling: case.scaling.clone() }, head_dim);
    assert_eq!(rotation.attention_factor, case.attention_factor as f32);
    for (i, expected) in case.inverse_frequencies.iter().enumerate() {
        let what = format!("{:?} frequency {i}", case.scaling);
        assert_near(rotation.inverse_frequencies[i], *expected, &what);
    }
    // Angles from their frequencies: a frequency one unit off would be 2047 units off in the angle.
    let frequencies = case.inverse_frequencies.iter().map(|bits| f32::from_bits(*bits)).collect();
    let rotation = Rotation { inverse_frequencies: frequencies, ..rotation };
    for (i, (cosine, sine)) in rotation.turns(2047).into_iter().enumerate() {
        assert_near(cosine, case.cosines[i], &format!("{:?} cosine {i}", case.scaling));
        assert_near(sine, case.sines[i], &format!("{:?} sine {i}", case.scaling));
    }
}

#[test]
fn unscaled() {
    check(&Case {
        scaling: RopeScaling::Default,
        theta: 10000.0,
        attention_factor: 1.0,
        inverse_frequencies: &[
            0x3f80_0000,
            0x3ea1_e89b,
            0x3dcc_cccd,
            0x3d01_86e3,
            0x3c23_d70a,
            0x3b4f_3e38,
            0x3a83_126f,
            0x39a5_cb60,
        ],
        cosines: &[
            0x3e7f_b55b,
            0x3f7d_1ea0,
            0xbf61_17aa,
            0xbea5_82f3,
            0xbd4b_4556,
            0x3f7b_64aa,
            0xbeea_b48b,
            0x3f4c_3652,
        ],
        sines: &[
            0xbf77_e3c6,
            0x3e19_2d5d,
            0xbef3_e158,
            0x3f72_4148,
            0x3f7f_af40,
            0x3e41_638d,
            0x3f63_8490,
            0x3f1a_6172,
        ],
    });
}

#[test]
fn linear() {
    check(&Case {
        scaling: RopeScaling::Linear { factor: 3.0 },
        theta: 20000.0,
        attention_factor: 1.0,
        inverse_frequencies: &[
            0x3eaa_aaab,
            0x3dc5_f60d,
            0x3ce5_9eec,
            0x3c05_2bff,
            0x3b1a_7847,
            0x3a33_2c89,
            0x394f_d439,
            0x3871_111b,
        ],
        cosines: &[
            0xbf52_281c,
            0xbf7f_99c2,
            0x3f2d_0d33,
            0xbf18_f70d,
            0x3de5_c8e1,
            0x3e2e_f0f9,
            0x3f6b_37bf,
            0x3f7e_3af5,
        ],
        sines: &[
            0xbf12_2f77,
            0x3d64_b502,
            0x3f3c_a6a1,
            0xbf4d_4651,
            0xbf7e_622f,
            0x3f7c_3c87,
            0x3eca_1349,
            0x3df0_64c5,
        ],
    });
}

#[test]
fn llama3() {
    check(&Case {
        scaling: RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original: 128,
        },
        theta: 500000.0,
        attention_factor: 1.0,
        inverse_frequencies: &[
            0x3f80_0000,
            0x3ee1_77bc,
            0x3e43_b6aa,
            0x3cee_602c,
            0x3b9a_08c8,
            0x3b07_a9c3,
            0x3a6e_f74f,
            0x39d2_7720,
            0x3939_5d21,
            0x38a3_418d,
            0x380f_c8f8,
            0x377d_45c3,
            0x36df_10c4,
            0x3644_7610,
            0x35ad_07a7,
            0x3518_64a7,
        ],
        cosines: &[
            0x3e7f_b55b,
            0xbf7a_8e2c,
            0xbddc_0896,
            0xbf7d_fd0e,
            0xbf7b_03de,
            0xbeea_26a4,
            0xbe94_f6bc,
            0x3f2e_5325,
            0x3f6f_6bd8,
            0x3f7c_c1ae,
            0x3f7f_5eb5,
            0x3f7f_e0b6,
            0x3f7f_f9ef,
            0x3f7f_fed3,
            0x3f7f_ffc6,
            0x3f7f_fff5,
        ],
        sines: &[
            0xbf77_e3c6,
            0x3e52_1137,
            0x3f7e_84a9,
            0x3e00_1d74,
            0xbe49_17fd,
            0xbf63_a91b,
            0x3f74_ece6,
            0x3f3b_7998,
            0x3eb5_419a,
            0x3e22_7c94,
            0x3d8f_98cf,
            0x3cfd_1bca,
            0x3c5e_f31f,
            0x3bc4_5d34,
            0x3b2c_f1f9,
            0x3a98_5198,
        ],
    });
}

#[test]
fn yarn() {
    check(&Case {
        scaling: RopeScaling::Yarn {
            factor: 4.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            original: 1024,
            attention_factor: None,
            mscale: None,
            mscale_all_dim: None,
            truncate: true,
        },
        theta: 1000000.0,
        attention_factor: 1.138629436111989,
        inverse_frequencies: &[
            0x3f80_0000,
            0x3ed7_e89b,
            0x3e1a_c80c,
            0x3d57_0279,
            0x3c8e_7ac6,
            0x3bae_c98e,
            0x3ab8_449c,
            0x3a1b_690d,
            0x3983_126f,
            0x38dd_1725,
            0x383a_7753,
            0x379d_43a4,
            0x3704_a2b2,
            0x365f_ba4f,
            0x35bc_b0c1,
            0x351f_23e4,
        ],
        cosines: &[
            0x3e91_941d,
            0xbf5a_237d,
            0x3d23_f6b7,
            0x3f6a_1df9,
            0xbf12_4d78,
            0xbdb2_aeff,
            0xbf8c_b3c8,
            0x3ecb_dd5d,
            0x3f7e_2568,
            0x3f8e_5d2e,
            0x3f91_2438,
            0x3f91_a324,
            0x3f91_b9b9,
            0x3f91_bdbd,
            0x3f91_be75,
            0x3f91_be95,
        ],
        sines: &[
            0xbf8d_2095,
            0x3f41_57c5,
            0x3f91_a78c,
            0x3f2d_a6fb,
            0xbf7c_1d2e,
            0xbf91_50ea,
            0x3e98_04b3,
            0x3f88_8af3,
            0x3f0e_be4c,
            0x3e79_ab2d,
            0x3dd3_eb5a,
            0x3d32_ef30,
            0x3c96_f141,
            0x3bfe_9ddd,
            0x3b56_be49,
            0x3ab5_1cfa,
        ],
    });
}

#[test]
fn yarn_of_deepseek_without_truncation() {
    check(&Case {
        scaling: RopeScaling::Yarn {
            factor: 40.0,
            beta_fast: 16.0,
            beta_slow: 2.0,
            original: 1024,
            attention_factor: None,
            mscale: Some(1.0),
            mscale_all_dim: Some(0.5),
            truncate: false,
        },
        theta: 10000.0,
        attention_factor: 1.1557219901962608,
        inverse_frequencies: &[
            0x3f80_0000,
            0x3f0f_f59a,
            0x3ea1_e89b,
            0x3e36_1887,
            0x3dcc_cccd,
            0x3d2a_27ce,
            0x3c72_e6b6,
            0x3b67_d21b,
            0x3983_126f,
            0x3913_6a16,
            0x38a5_cb60,
            0x383a_7753,
            0x37d1_b717,
            0x376b_dcf0,
            0x3704_a2b3,
            0x3695_2c42,
        ],
        cosines: &[
            0x3e93_c391,
            0x3ea4_1e05,
            0x3f92_4499,
            0x3f87_9d97,
            0xbf82_1278,
            0xbf90_9544,
            0x3f0e_8b6b,
            0x3f2a_3f57,
            0x3f80_fb0a,
            0x3f8d_d956,
            0x3f91_ffe3,
            0x3f93_51fe,
            0x3f93_bd1f,
            0x3f93_df05,
            0x3f93_e9bd,
            0x3f93_ed21,
        ],
        sines: &[
            0xbf8f_3eee,
            0x3f8e_20f9,
            0x3e31_07bf,
            0xbeec_62f3,
            0xbf0c_edcc,
            0xbe7a_67ff,
            0xbf81_a199,
            0x3f71_f98f,
            0x3f10_e2da,
            0x3ea7_f239,
            0x3e3e_af12,
            0x3dd7_19c0,
            0x3d72_25fe,
            0x3d08_35f0,
            0x3c99_3553,
            0x3c2c_50d9,
        ],
    });
}
