//! Typed reads from a JSON object, each failing with the dotted key and what was found there.

use std::path::Path;

use serde_json::{Map, Value};

use crate::{Error, Result};

/// A JSON object with the file and key path it came from. A `null` reads as absent.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Object<'a> {
    pub(crate) file: &'a Path,
    pub(crate) prefix: &'a str,
    pub(crate) map: &'a Map<String, Value>,
}

impl<'a> Object<'a> {
    pub(crate) fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    pub(crate) fn dotted(&self, key: &str) -> String {
        if self.prefix.is_empty() { key.to_owned() } else { format!("{}.{key}", self.prefix) }
    }

    pub(crate) fn wrong(&self, key: &str, expected: &str, found: &Value) -> Error {
        let found: String = found.to_string().chars().take(60).collect();
        Error::config(
            self.file,
            &self.dotted(key),
            format!("expected {expected}, found {found}"),
            "correct the file or download it again",
        )
    }

    pub(crate) fn absent(&self, key: &str) -> Error {
        Error::config(
            self.file,
            &self.dotted(key),
            "required and missing",
            "restore the config.json of the original model",
        )
    }

    pub(crate) fn usize(&self, key: &str) -> Result<Option<usize>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_u64() {
            Some(number) if number <= 1 << 40 => Ok(Some(number as usize)),
            _ => Err(self.wrong(key, "a non-negative integer", value)),
        }
    }

    /// A count or dimension, at least 1.
    pub(crate) fn positive(&self, key: &str) -> Result<Option<usize>> {
        match self.usize(key)? {
            Some(0) => Err(self.wrong(key, "a positive integer", &Value::from(0))),
            other => Ok(other),
        }
    }

    pub(crate) fn required(&self, key: &str) -> Result<usize> {
        self.positive(key)?.ok_or_else(|| self.absent(key))
    }

    pub(crate) fn number(&self, key: &str) -> Result<Option<f64>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_f64() {
            Some(number) if number.is_finite() => Ok(Some(number)),
            _ => Err(self.wrong(key, "a finite number", value)),
        }
    }

    pub(crate) fn boolean(&self, key: &str) -> Result<Option<bool>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_bool().map(Some).ok_or_else(|| self.wrong(key, "true or false", value))
    }

    pub(crate) fn string(&self, key: &str) -> Result<Option<&'a str>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| self.wrong(key, "a string", value))
    }

    pub(crate) fn object(&self, key: &str) -> Result<Option<&'a Map<String, Value>>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_object().map(Some).ok_or_else(|| self.wrong(key, "an object", value))
    }

    pub(crate) fn strings(&self, key: &str) -> Result<Vec<String>> {
        let Some(value) = self.get(key) else { return Ok(Vec::new()) };
        let wrong = || self.wrong(key, "a list of strings", value);
        match value {
            Value::String(one) => Ok(vec![one.clone()]),
            Value::Array(items) => {
                items.iter().map(|i| i.as_str().map(str::to_owned).ok_or_else(wrong)).collect()
            }
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::Object(_) => Err(wrong()),
        }
    }

    pub(crate) fn positives(&self, key: &str) -> Result<Vec<usize>> {
        let Some(value) = self.get(key) else { return Ok(Vec::new()) };
        let wrong = || self.wrong(key, "a list of non-negative integers", value);
        let items = value.as_array().ok_or_else(wrong)?;
        items.iter().map(|i| i.as_u64().map(|n| n as usize).ok_or_else(wrong)).collect()
    }
}
