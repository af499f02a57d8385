//! Whether only the rows that predict a scored position need leave the last layer: where each of them is computed as if
//! it were alone, scores have the same bits. Decides by the model as data.

use ctq_model::Spec;
use ctq_model::inventory::{Inventory, Part, PartInventory};
use ctq_model::scheme::{Activation, ActivationScale, ActivationSharing};

use crate::treatment::Acts;

/// True where nothing after the keys and values of the last layer looks beyond a row.
pub(crate) fn rows_stand_alone(inventory: &Inventory, acts: Acts) -> bool {
    let spec = &inventory.spec;
    let Some(last) = spec.blocks.len().checked_sub(1) else { return false };
    match acts {
        Acts::Off => true,
        Acts::Library | Acts::Kernel => {
            layer_stands_alone(spec, last, inventory.part(Part::Layer(last)))
                && !shares_scale(inventory.part(Part::Head), |_| true)
        }
    }
}

fn layer_stands_alone(spec: &Spec, index: usize, part: &PartInventory) -> bool {
    let attention = &spec.blocks[index].attention;
    let queries = part.kv.as_ref().filter(|kv| kv.queries).map(|kv| kv.activation);
    // Keys and values are computed of all rows in any case.
    !shares_scale(part, |module| module != attention.k && module != attention.v)
        && !queries.is_some_and(is_of_window)
}

/// Whether inputs or outputs of a linear among `modules` have one scale, found from the data, for all rows of a window.
fn shares_scale(part: &PartInventory, modules: impl Fn(&str) -> bool) -> bool {
    let linears = part.linears.iter().filter(|linear| modules(&linear.module));
    let mut schemes = linears.map(|linear| &linear.scheme);
    schemes.any(|scheme| scheme.input.is_some_and(is_of_window) || scheme.output.is_some_and(is_of_window))
}

/// True where one scale, found from the data, covers all rows of a window.
pub(crate) fn is_of_window(activation: Activation) -> bool {
    activation.sharing == ActivationSharing::Tensor && activation.scale != ActivationScale::Static
}
