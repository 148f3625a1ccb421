//! Tests of `src/call.rs`.

use super::*;

/// The identifiers of `kernels/call.cuh` between two marks.
fn listed(first: &str) -> Vec<String> {
    let header = include_str!("../../kernels/call.cuh");
    let body = header.split_once(first).unwrap_or_else(|| panic!("no {first}")).1;
    let body = body.split_once('}').expect("the list ends").0;
    let code = body.lines().map(|line| line.split("//").next().unwrap_or("")).collect::<String>();
    code.split([',', '{', ';']).map(|item| item.split('=').next().unwrap_or("").trim().to_owned()).collect()
}

/// `kLogProb` of `LogProb`, and `kRatioMean` of `ratio_mean`.
fn constant(name: &str) -> String {
    let words = name.split('_').map(|word| word[..1].to_uppercase() + &word[1..]);
    format!("k{}", words.collect::<String>())
}

#[test]
fn the_kernels_count_fields_and_metrics_alike() {
    let wanted = |names: &[&str]| names.iter().map(|name| constant(name)).collect::<Vec<_>>();
    let found = |list, prefix: &str| {
        let names = listed(list).into_iter().filter(|name| name.starts_with(prefix));
        names.filter(|name| !name.ends_with("Fields") && !name.ends_with("Count")).collect::<Vec<_>>()
    };
    assert_eq!(found("enum Field : int", "k"), wanted(&Field::NAMES));
    let batch: Vec<&str> = ["policy_divisor"].into_iter().chain(METRICS).collect();
    assert_eq!(found("enum BatchNumber : int", "k"), wanted(&batch));
}

#[test]
fn the_kernels_name_the_same_arguments() {
    for (list, names) in [
        ("struct Latents {", Latents::NAMES.to_vec()),
        ("struct RowVectors {", RowVectors::NAMES.to_vec()),
        ("struct Schedule {", Schedule::NAMES.to_vec()),
        ("struct SdeStepLatents {", SdeStepLatents::NAMES.to_vec()),
    ] {
        let found: Vec<String> =
            listed(list).iter().filter_map(|item| item.split_whitespace().last().map(str::to_owned)).collect();
        assert_eq!(found, names, "{list}");
    }
}

#[test]
fn a_row_vector_reads_nothing_past_its_end() {
    let of = |divide, modulo, rows| RowVector::array("std", 64, Dtype::F32, (divide, modulo), rows);
    assert_eq!(of(3, 2, 6).map(|vector| (vector.divide, vector.modulo)), Ok((3, 2)));
    for (divide, modulo, rows) in [(0, 1, 4), (1, 0, 4), (1, 5, 4), (5, 1, 4), (1 << 32, 1, 1 << 33)] {
        assert_eq!(of(divide, modulo, rows).err(), Some(Error::Broadcast { name: "std", divide, modulo, rows }));
    }
}
