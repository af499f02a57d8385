//! Which group of `quantization_config` a module belongs to: ignore lists, names, `re:` patterns and class names.
//!
//! The order of preference is compressed-tensors' own: an exact name, then a pattern (ties by the alphabetical
//! order of the pattern), then a class name. Knows names only; whether the tensors agree is checked in
//! [`crate::scheme`].

use std::path::Path;

use fancy_regex::Regex;

use crate::quantization::{Group, QuantizationConfig};
use crate::{Error, Result};

/// The kind of module a name belongs to, as far as class names in a configuration distinguish them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ModuleClass {
    /// `nn.Linear` and what stands for it.
    Linear,
    /// `nn.Embedding`.
    Embedding,
    /// An attention module as a whole.
    Attention,
}

/// Compiled targets and ignores of one configuration.
#[derive(Debug)]
pub struct Matcher<'a> {
    ignore: Vec<Pattern>,
    /// (pattern, group), unique by target text, in alphabetical order.
    targets: Vec<(Pattern, &'a Group)>,
}

#[derive(Debug)]
struct Pattern {
    text: String,
    /// Python's `re.match`: anchored on the left only.
    regex: Option<Regex>,
}

impl Pattern {
    fn compile(file: &Path, text: &str) -> Result<Pattern> {
        let Some(expression) = text.strip_prefix("re:") else {
            return Ok(Pattern { text: text.to_owned(), regex: None });
        };
        let regex = Regex::new(&format!("^(?:{expression})")).map_err(|e| {
            Error::config(
                file,
                "quantization_config",
                format!("`{text}` is not a regular expression ({e})"),
                "correct the target or ignore entry",
            )
        })?;
        Ok(Pattern { text: text.to_owned(), regex: Some(regex) })
    }

    /// `re:.*v_proj` does not mean `qkv_proj`: a projection that is fused only in serving engines is meant by patterns
    /// that spell it out.
    fn matches_name(&self, name: &str) -> bool {
        let fused = FUSED_STEMS.iter().find(|stem| name.ends_with(&format!(".{stem}_proj")));
        fused.is_none_or(|stem| self.text.contains(stem))
            && match &self.regex {
                Some(regex) => regex.is_match(name).unwrap_or(false),
                None => self.text == name,
            }
    }

    fn matches_class(&self, class: ModuleClass) -> bool {
        self.regex.is_none()
            && match class {
                ModuleClass::Linear => matches!(self.text.as_str(), "Linear" | "LinearBase"),
                ModuleClass::Embedding => self.text == "Embedding",
                ModuleClass::Attention => self.text.ends_with("Attention"),
            }
    }
}

impl<'a> Matcher<'a> {
    /// Compiles the patterns of a configuration; `file` is named in messages.
    ///
    /// # Errors
    /// Where a `re:` entry is not a regular expression.
    pub fn new(file: &Path, config: &'a QuantizationConfig) -> Result<Matcher<'a>> {
        let ignore = config.ignore.iter().map(|text| Pattern::compile(file, text)).collect::<Result<_>>()?;
        let mut targets: Vec<(Pattern, &Group)> = Vec::new();
        for group in &config.groups {
            for text in &group.targets {
                targets.retain(|(pattern, _)| pattern.text != *text);
                targets.push((Pattern::compile(file, text)?, group));
            }
        }
        targets.sort_by(|(a, _), (b, _)| a.text.cmp(&b.text));
        Ok(Matcher { ignore, targets })
    }

    /// True when the ignore list names the module.
    pub fn ignores(&self, module: &str, class: ModuleClass) -> bool {
        let names = spellings(module);
        self.ignore.iter().any(|pattern| {
            names.iter().any(|name| pattern.matches_name(name))
                || (class != ModuleClass::Attention && pattern.matches_class(class))
        })
    }

    /// The group of a module that is not ignored.
    pub fn group(&self, module: &str, class: ModuleClass) -> Option<&'a Group> {
        if self.ignores(module, class) {
            return None;
        }
        for name in spellings(module) {
            let exact = self.targets.iter().find(|(p, _)| p.regex.is_none() && p.matches_name(&name));
            let pattern = || self.targets.iter().find(|(p, _)| p.regex.is_some() && p.matches_name(&name));
            if let Some((_, group)) = exact.or_else(pattern) {
                return Some(group);
            }
        }
        self.targets.iter().find(|(pattern, _)| pattern.matches_class(class)).map(|(_, group)| *group)
    }

    /// The group of an attention module as a whole, which quantizes queries, keys and values.
    ///
    /// Only a target that hits the module and neither its parent nor one of `children` means the module itself
    /// (`is_narrow_match`): `re:.*self_attn.*` is a way to name the projections.
    pub fn attention_group(&self, module: &str, children: &[&str]) -> Option<&'a Group> {
        let group = self.group(module, ModuleClass::Attention)?;
        let parent = module.rsplit_once('.').map_or("", |(parent, _)| parent);
        let hits = |pattern: &Pattern, name: &str| spellings(name).iter().any(|n| pattern.matches_name(n));
        let narrow = |pattern: &Pattern| {
            (hits(pattern, module) || pattern.matches_class(ModuleClass::Attention))
                && !hits(pattern, parent)
                && !children.iter().any(|child| hits(pattern, child))
        };
        let mut own = self.targets.iter().filter(|(_, of)| std::ptr::eq(*of, group));
        own.any(|(pattern, _)| narrow(pattern)).then_some(group)
    }
}

/// What the names of fused projections begin with. No checkpoint of a supported family has such a module.
const FUSED_STEMS: &[&str] = &["qkv", "gate_up"];

/// A module's name as stored, then as other writers spell it: with and without the prefixes of multimodal
/// models, Mixtral's experts in either spelling, and the fused projections of serving engines.
fn spellings(module: &str) -> Vec<String> {
    let mut names = vec![module.to_owned()];
    let bare = ["model.language_model.", "language_model.model.", "model."]
        .iter()
        .find_map(|prefix| module.strip_prefix(prefix));
    if let Some(bare) = bare {
        for prefix in ["model.", "model.language_model.", "language_model.model."] {
            names.push(format!("{prefix}{bare}"));
        }
    }
    const LEAVES: &[(&str, &str)] = &[("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")];
    const FUSED: &[(&str, &str)] = &[
        ("q_proj", "qkv_proj"),
        ("k_proj", "qkv_proj"),
        ("v_proj", "qkv_proj"),
        ("gate_proj", "gate_up_proj"),
        ("up_proj", "gate_up_proj"),
    ];
    for name in names.clone() {
        let Some((parent, leaf)) = name.rsplit_once('.') else { continue };
        for (a, b) in LEAVES {
            if leaf == *a {
                names.push(format!("{parent}.{b}"));
            } else if leaf == *b && parent.contains(".experts.") {
                names.push(format!("{parent}.{a}"));
            }
        }
        for (part, fused) in FUSED {
            if leaf == *part {
                names.push(format!("{parent}.{fused}"));
            }
        }
    }
    let mut seen = Vec::new();
    names.retain(|name| {
        let new = !seen.contains(name);
        seen.push(name.clone());
        new
    });
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(name: &str, targets: &[&str]) -> Group {
        Group {
            name: name.to_owned(),
            targets: targets.iter().map(|t| (*t).to_owned()).collect(),
            format: None,
            weights: None,
            input_activations: None,
            output_activations: None,
        }
    }

    fn config(groups: Vec<Group>, ignore: &[&str]) -> QuantizationConfig {
        QuantizationConfig {
            format: None,
            groups,
            ignore: ignore.iter().map(|i| (*i).to_owned()).collect(),
            kv_cache: None,
            version: None,
        }
    }

    fn chosen(config: &QuantizationConfig, module: &str) -> Option<String> {
        let matcher = Matcher::new(Path::new("config.json"), config).unwrap();
        matcher.group(module, ModuleClass::Linear).map(|g| g.name.clone())
    }

    #[test]
    fn an_exact_name_beats_a_pattern_and_a_pattern_beats_a_class() {
        let config = config(
            vec![
                group("class", &["Linear"]),
                group("pattern", &["re:.*q_proj$"]),
                group("exact", &["model.layers.0.self_attn.q_proj"]),
            ],
            &["lm_head", "re:.*mlp.gate$"],
        );
        assert_eq!(chosen(&config, "model.layers.0.self_attn.q_proj").as_deref(), Some("exact"));
        assert_eq!(chosen(&config, "model.layers.1.self_attn.q_proj").as_deref(), Some("pattern"));
        assert_eq!(chosen(&config, "model.layers.1.self_attn.k_proj").as_deref(), Some("class"));
        assert_eq!(chosen(&config, "lm_head"), None);
        assert_eq!(chosen(&config, "model.layers.3.mlp.gate"), None);
        // `$` keeps the ignored router from swallowing the gate projection.
        assert_eq!(chosen(&config, "model.layers.3.mlp.gate_proj").as_deref(), Some("class"));
    }

    #[test]
    fn patterns_are_anchored_on_the_left_only_and_ties_are_alphabetical() {
        let config =
            config(vec![group("b", &["re:.*self_attn.*"]), group("a", &["re:.*q_proj"])], &["re:lm_head"]);
        assert_eq!(chosen(&config, "model.layers.0.self_attn.q_proj").as_deref(), Some("a"));
        assert_eq!(chosen(&config, "model.lm_head_like.self_attn").as_deref(), Some("b"));
        assert_eq!(chosen(&config, "lm_head.extra"), None);
    }

    #[test]
    fn a_pattern_for_one_projection_does_not_mean_the_fused_ones() {
        let config = config(
            vec![group("linear", &["Linear"]), group("some", &["re:.*v_proj$", "re:.*up_proj$"])],
            &["re:.*layers.1.*v_proj"],
        );
        for (module, expected) in [
            ("model.layers.0.self_attn.q_proj", Some("linear")),
            ("model.layers.0.self_attn.k_proj", Some("linear")),
            ("model.layers.0.self_attn.v_proj", Some("some")),
            ("model.layers.0.mlp.gate_proj", Some("linear")),
            ("model.layers.0.mlp.up_proj", Some("some")),
            ("model.layers.1.self_attn.q_proj", Some("linear")),
            ("model.layers.1.self_attn.v_proj", None),
        ] {
            assert_eq!(chosen(&config, module).as_deref(), expected, "{module}");
        }
    }

    #[test]
    fn attention_as_a_whole_is_meant_by_narrow_targets_only() {
        let module = "model.layers.0.self_attn";
        let chosen = |target: &str| {
            let config = config(vec![group("a", &[target])], &[]);
            let matcher = Matcher::new(Path::new("config.json"), &config).unwrap();
            let children = [format!("{module}.q_proj"), format!("{module}.o_proj")];
            let children: Vec<&str> = children.iter().map(String::as_str).collect();
            matcher.attention_group(module, &children).is_some()
        };
        for narrow in ["LlamaAttention", "re:.*self_attn$", "model.layers.0.self_attn"] {
            assert!(chosen(narrow), "{narrow}");
        }
        for wide in ["Linear", "re:.*self_attn.*", "re:.*layers.0.*", "re:.*self_attn", "re:.*_proj$"] {
            assert!(!chosen(wide), "{wide}");
        }
    }

    #[test]
    fn other_spellings_are_found() {
        let config =
            config(vec![group("fused", &["re:.*qkv_proj$"]), group("up", &["re:.*experts.*up_proj$"])], &[]);
        assert_eq!(chosen(&config, "model.layers.0.self_attn.v_proj").as_deref(), Some("fused"));
        assert_eq!(chosen(&config, "model.layers.0.block_sparse_moe.experts.3.w3").as_deref(), Some("up"));
        assert_eq!(chosen(&config, "model.layers.0.block_sparse_moe.experts.3.w2"), None);
    }
}
