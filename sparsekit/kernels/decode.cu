// y = x W^T for few tokens, with W in 4-bit integers, either 2:4 sparse (mma.sp, metadata undecoded) or dense.
//
// Compiled at run time, once for each setting, with these macros:
//   SPARSE   1: 2:4, 0: dense
//   BF16     1: activations and results are bfloat16, 0: float16
//   MT       tiles of 16 rows that a warp computes at once
//   NT       tiles of 8 tokens
//   WR, WK   warps of a block along the rows and along the inputs
//   STAGES   units of a warp that are in shared memory or on their way there
//   SPLIT    blocks that share rows and take part of the inputs each, a cluster; compute capability 9.0 for more than 1
//   GROUPS   scales of a row in 128 inputs: 1, 2 or 4
//   BLOCKS   blocks that shall fit a multiprocessor at once, which limits registers
//
// Weights lie in units of 16 rows x 128 inputs in the order in which the lanes of a warp read them (decode_layout.py,
// `arrange`): codes, then metadata, then scales. Every warp walks over units of its rows, and the warps of a block add
// up their sums in a fixed order, so a result never depends on timing.

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;

#define CODES (SPARSE ? 4 : 8)                       // words of a lane in a unit
#define META (SPARSE ? 2 : 0)
#define UNIT (32 * (CODES + META) + 8 * GROUPS)      // words of a unit
#define ROWS (16 * MT * WR)                          // rows of a block
#define TOKENS (8 * NT)
#define THREADS (32 * WR * WK)
#define AHEAD (NT == 1)       // inputs come through registers, else through shared memory
#define TILE (TOKENS * 128)   // values of a unit's inputs

struct Loaded {
    uint4 codes[SPARSE ? 1 : 2];
    uint2 meta;
    u32 scales[GROUPS];  // of rows g and g + 8, float16 each
};

// A lane's part of a unit.
static __device__ __forceinline__ Loaded part_of(const u32* unit, int lane) {
    Loaded found;
    found.codes[0] = *(const uint4*)(unit + 4 * lane);
    if (!SPARSE) found.codes[SPARSE ? 0 : 1] = *(const uint4*)(unit + 128 + 4 * lane);
    if (SPARSE) found.meta = *(const uint2*)(unit + 128 + 2 * lane);
#pragma unroll
    for (int s = 0; s < GROUPS; s++) found.scales[s] = unit[32 * (CODES + META) + 8 * s + (lane >> 2)];
    return found;
}

static __device__ __forceinline__ u32 shared_address(const void* at) { return (u32)__cvta_generic_to_shared(at); }

// Begin to copy a unit to shared memory; every byte is used once, so none of it stays in the L1 cache.
static __device__ __forceinline__ void fetch_unit(u32* unit, const u32* from, int lane) {
#pragma unroll
    for (int at = 4 * lane; at < UNIT; at += 128)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(unit + at)), "l"(from + at));
}

static __device__ __forceinline__ float half_to_float(u16 bits) {
    float v;
    asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"(bits));
    return v;
}

// Eight 4-bit codes of a word as four pairs of exact values code - 8; pair i is nibbles i and i + 4.
static __device__ __forceinline__ void widen(u32 word, u32 (&pairs)[4]) {
#if BF16
#pragma unroll
    for (int i = 0; i < 4; i++) {
        u32 v;
        asm("lop3.b32 %0, %1, 0x000f000f, 0x43004300, 0xea;" : "=r"(v) : "r"(word >> 4 * i));  // 128 + code
        asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(pairs[i]) : "r"(v), "r"(0x3f803f80), "r"(0xc308c308));  // - 136
    }
#else
#pragma unroll
    for (int i = 0; i < 2; i++) {
        u32 low, high;
        asm("lop3.b32 %0, %1, 0x000f000f, 0x64006400, 0xea;" : "=r"(low) : "r"(word >> 8 * i));   // 1024 + code
        asm("lop3.b32 %0, %1, 0x00f000f0, 0x64006400, 0xea;" : "=r"(high) : "r"(word >> 8 * i));  // 1024 + 16 code
        asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(pairs[2 * i]) : "r"(low), "r"(0x64086408));         // - 1032
        asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(pairs[2 * i + 1]) : "r"(high), "r"(0x2c002c00), "r"(0xd480d480));
    }
#endif
}

#if BF16
#define TYPE "bf16"
#else
#define TYPE "f16"
#endif
#if defined(__CUDACC_VER_MAJOR__) && (__CUDACC_VER_MAJOR__ > 12 || (__CUDACC_VER_MAJOR__ == 12 && __CUDACC_VER_MINOR__ >= 5))
#define MMA_SP "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32." TYPE "." TYPE ".f32"
#else
#define MMA_SP "mma.sp.sync.aligned.m16n8k32.row.col.f32." TYPE "." TYPE ".f32"
#endif

// sum += A B with A 16x32, 2:4; `half` says which two lanes of four hold its metadata.
template <int HALF>
static __device__ __forceinline__ void multiply_sparse(float (&sum)[4], const u32 (&a)[4], const u32 (&b)[4], u32 meta) {
    asm(MMA_SP " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9,%10,%11}, {%0,%1,%2,%3}, %12, %13;"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(meta),
          "n"(HALF));
}

// sum += A B with A 16x16.
static __device__ __forceinline__ void multiply_dense(float (&sum)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// A lane's share of one unit's inputs, for 8 tokens: of every 32 inputs 8 consecutive ones.
struct Inputs {
    uint4 values[4];
};

static __device__ __forceinline__ Inputs load_inputs(const u16* x, int tokens, int columns, int left, int lane) {
    Inputs found;
#pragma unroll
    for (int k = 0; k < 4; k++) {
        const int token = lane >> 2, column = 32 * k + 8 * (lane & 3);
        uint4 v = make_uint4(0, 0, 0, 0);
        if (token < tokens && column < left)  // volatile: to stay ahead of its use
            asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
                         : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(x + (long)token * columns + column));
        found.values[k] = v;
    }
    return found;
}

// 32 inputs of 8 tokens as the tensor cores want them. For 2:4, two neighbouring lanes swap halves: the even one keeps
// the first two inputs of four groups of four, the odd one the others.
static __device__ __forceinline__ void operand(u32 (&b)[4], const uint4& v, int lane) {
#if SPARSE
    const bool odd = lane & 1;
    const u32 s0 = __shfl_xor_sync(0xffffffffu, odd ? v.x : v.y, 1);
    const u32 s1 = __shfl_xor_sync(0xffffffffu, odd ? v.z : v.w, 1);
    b[0] = odd ? s0 : v.x;
    b[1] = odd ? s1 : v.z;
    b[2] = odd ? v.y : s0;
    b[3] = odd ? v.w : s1;
#else
    b[0] = v.x, b[1] = v.y, b[2] = v.z, b[3] = v.w;
#endif
}

// Where 8 inputs of a token are in a tile: those of eight tokens lie in different banks.
static __device__ __forceinline__ int place(int token, int eighth) { return token * 16 + (eighth ^ (token & 7)); }

// Begin to copy a unit's inputs to shared memory, by the warps that need it; what is not there becomes 0. For 2:4, of
// every 32 inputs groups i and i + 4 of four lie side by side, as a tensor core takes them together.
static __device__ __forceinline__ void fetch_inputs(uint4* tile, const u16* x, int tokens, int columns, int left, int thread) {
#pragma unroll
    for (int at = thread; at < TILE / 8; at += 32 * WR) {
        const int token = at / 16, eighth = at % 16;
        const bool real = token < tokens && 8 * eighth < left;
        const u16* from = real ? x + (long)token * columns + 8 * eighth : x;
#if SPARSE
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int group = 2 * (eighth & 3) + half;
            const u32 to = shared_address(tile + place(token, (eighth & ~3) + (group & 3))) + 8 * (group >> 2);
            asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(to), "l"(from + 4 * half), "r"(real ? 8 : 0));
        }
#else
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(tile + place(token, eighth))),
                     "l"(from), "r"(real ? 16 : 0));
#endif
    }
}

// The same 32 inputs of 8 tokens from a tile; nothing has to be moved between lanes.
static __device__ __forceinline__ void operand_of_tile(u32 (&b)[4], const uint4* tile, int k, int n, int lane) {
#if SPARSE
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
                 : "r"(shared_address(tile + place(8 * n + (lane & 7), 4 * k + (lane >> 3)))));
#else
    const uint4 v = tile[place(8 * n + (lane >> 2), 4 * k + (lane & 3))];
    b[0] = v.x, b[1] = v.y, b[2] = v.z, b[3] = v.w;
#endif
}

static __device__ __forceinline__ u32 word_of(const uint4& v, int i) {
    return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

static __device__ __forceinline__ u16 narrow(float v) {
    u16 bits;
#if BF16
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(v));
#else
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(v));
#endif
    return bits;
}

// Products of one unit of 16 rows for every tile of tokens, scaled and added to `sums`.
static __device__ __forceinline__ void accumulate(float (&sums)[NT][4], const Loaded& weights, const u32 (&b)[4][NT][4]) {
#pragma unroll
    for (int s = 0; s < GROUPS; s++) {
        float part[NT][4];
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) part[n][i] = 0.0f;
#pragma unroll
        for (int q = 0; q < 4 / GROUPS; q++) {
            const int k = s * (4 / GROUPS) + q;  // which 32 inputs of the unit
            u32 a[4];
#if SPARSE
            widen(word_of(weights.codes[0], k), a);
            const u32 meta = k < 2 ? weights.meta.x : weights.meta.y;
#pragma unroll
            for (int n = 0; n < NT; n++) {
                if (k & 1) multiply_sparse<1>(part[n], a, b[k][n], meta);
                else multiply_sparse<0>(part[n], a, b[k][n], meta);
            }
#else
#pragma unroll
            for (int h = 0; h < 2; h++) {
                widen(word_of(weights.codes[SPARSE ? 0 : k >> 1], 2 * (k & 1) + h), a);
#pragma unroll
                for (int n = 0; n < NT; n++) multiply_dense(part[n], a, b[k][n][2 * h], b[k][n][2 * h + 1]);
            }
#endif
        }
        const float upper = half_to_float((u16)weights.scales[s]), lower = half_to_float((u16)(weights.scales[s] >> 16));
#pragma unroll
        for (int n = 0; n < NT; n++) {
            sums[n][0] += upper * part[n][0];
            sums[n][1] += upper * part[n][1];
            sums[n][2] += lower * part[n][2];
            sums[n][3] += lower * part[n][3];
        }
    }
}

// What a block shares: weights and inputs on their way, then the sums of its warps; see `Setting.shared_bytes`.
union Shared {
    struct {
        u32 weights[WR * WK][STAGES][MT][UNIT];
        uint4 inputs[AHEAD ? 1 : WK][AHEAD ? 1 : STAGES][TILE / 8];
    } coming;
    float parts[WK][TOKENS][ROWS];
};
extern __shared__ uint4 pool[];

#if SPLIT > 1
#define CLUSTER __cluster_dims__(SPLIT, 1, 1)
#else
#define CLUSTER
#endif

// Wait for all threads of the cluster; what they wrote to shared memory can be seen then.
static __device__ __forceinline__ void cluster_barrier() {
    asm volatile("barrier.cluster.arrive;\nbarrier.cluster.wait;" ::: "memory");
}

// A number in the shared memory of a block of the cluster, at this block's address of its own.
static __device__ __forceinline__ float of_block(const float* at, int block) {
    u32 there;
    float value;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(at)), "r"(block));
    asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(there));
    return value;
}

// Each cluster has ROWS rows for itself; the warps along the inputs, of all its blocks, take turns at the units. Tiles
// of rows that the last cluster has too many are the last tile again, and their results are dropped.
extern "C" __global__ void CLUSTER __launch_bounds__(THREADS, BLOCKS) decode(
    const u32* __restrict__ weights, const u16* __restrict__ x, u16* __restrict__ y, int rows, int units, int tokens,
    int columns) {
    Shared& shared = *(Shared*)pool;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, wr = warp % WR, wk = warp / WR;
    const int part = blockIdx.x % SPLIT, cluster = blockIdx.x / SPLIT, turns = SPLIT * WK, turn = part * WK + wk;
    const int first = (cluster * WR + wr) * MT, last = (rows + 15) / 16 - 1;

    float sums[MT][NT][4];
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) sums[m][n][i] = 0.0f;

    // the next units are on their way while one is computed
    const auto fetch = [&](int stage, int unit) {
        if (unit < units) {
#pragma unroll
            for (int m = 0; m < MT; m++) {
                const u32* from = weights + ((long)min(first + m, last) * units + unit) * UNIT;
                fetch_unit(shared.coming.weights[warp][stage][m], from, lane);
            }
#if !AHEAD
            fetch_inputs(shared.coming.inputs[wk][stage], x + 128 * unit, tokens, columns, columns - 128 * unit, 32 * wr + lane);
#endif
        }
        asm volatile("cp.async.commit_group;");
    };
#pragma unroll
    for (int stage = 0; stage < STAGES - 1; stage++) fetch(stage, turn + stage * turns);
#if AHEAD
    const auto read = [&](int unit) { return load_inputs(x + 128 * unit, tokens, columns, columns - 128 * unit, lane); };
    Inputs given = read(turn);
#endif
    int stage = 0;
    for (int unit = turn; unit < units; unit += turns) {
        asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2));
        if (AHEAD || WR == 1) __syncwarp();
        else asm volatile("bar.sync %0, %1;" ::"r"(1 + wk), "n"(32 * WR) : "memory");  // of the warps with these inputs
        fetch(stage == 0 ? STAGES - 1 : stage - 1, unit + (STAGES - 1) * turns);
        u32 b[4][NT][4];
#if AHEAD
        const Inputs after = read(unit + turns);
#pragma unroll
        for (int k = 0; k < 4; k++) operand(b[k][0], given.values[k], lane);
        given = after;
#else
#pragma unroll
        for (int k = 0; k < 4; k++)
#pragma unroll
            for (int n = 0; n < NT; n++) operand_of_tile(b[k][n], shared.coming.inputs[wk][stage], k, n, lane);
#endif
#pragma unroll
        for (int m = 0; m < MT; m++) accumulate(sums[m], part_of(shared.coming.weights[warp][stage][m], lane), b);
        stage = stage == STAGES - 1 ? 0 : stage + 1;
    }
    asm volatile("cp.async.wait_all;");
    __syncthreads();  // what was on its way makes room for the sums

#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                shared.parts[wk][8 * n + 2 * (lane & 3) + (i & 1)][16 * (wr * MT + m) + (lane >> 2) + 8 * (i >> 1)] = sums[m][n][i];
    __syncthreads();
    const auto of_warps = [&](int at) {
        float sum = 0.0f;
#pragma unroll
        for (int k = 0; k < WK; k++) sum += (&shared.parts[k][0][0])[at];
        return sum;
    };
#if SPLIT > 1
    float* own = &shared.parts[0][0][0];
    for (int at = threadIdx.x; at < tokens * ROWS; at += THREADS) own[at] = of_warps(at);
    cluster_barrier();
    const auto whole = [&](int at) {
        float sum = 0.0f;
#pragma unroll
        for (int block = 0; block < SPLIT; block++) sum += of_block(own + at, block);
        return sum;
    };
#else
    const auto whole = of_warps;
#endif
    for (int at = part * THREADS + threadIdx.x; at < tokens * ROWS; at += SPLIT * THREADS) {
        const int row = cluster * ROWS + at % ROWS;
        const float sum = whole(at);
        if (row < rows) y[(long)(at / ROWS) * rows + row] = narrow(sum);
    }
#if SPLIT > 1
    cluster_barrier();  // nobody leaves while its sums are read
#endif
}

// The weight in full, [rows, columns], from one warp a unit; grid (tiles of 16 rows, units / warps of a block).
extern "C" __global__ void __launch_bounds__(THREADS) expand(
    const u32* __restrict__ weights, u16* __restrict__ out, int rows, int units, int columns) {
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    const int unit = blockIdx.y * (WR * WK) + (threadIdx.x >> 5);
    if (unit >= units) return;
    const Loaded found = part_of(weights + ((long)blockIdx.x * units + unit) * UNIT, lane);
#pragma unroll
    for (int k = 0; k < 4; k++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {  // rows g and g + 8
            const float scale = half_to_float((u16)(found.scales[k * GROUPS / 4] >> 16 * half));
            u64 fours[2];  // eight neighbouring inputs of the row
#if SPARSE
            const u32 word = word_of(found.codes[0], k), mine = k < 2 ? found.meta.x : found.meta.y;
#pragma unroll
            for (int j = 0; j < 2; j++) {  // the tensor core's groups t and t + 4
                const u32 meta = __shfl_sync(0xffffffffu, mine, 4 * g + 2 * (k & 1) + j) >> (16 * half + 4 * t);
                const int nibble = 2 * j + half;
                const u64 one = narrow(scale * ((int)(word >> 4 * nibble & 15) - 8));
                const u64 two = narrow(scale * ((int)(word >> (4 * nibble + 16) & 15) - 8));
                fours[j] = one << 16 * (meta & 3) | two << 16 * (meta >> 2 & 3);
            }
            // these are groups 4 (t & 1) + (t >> 1) and the next but one: swap one with the lane that has its neighbour
            const u64 other = __shfl_xor_sync(0xffffffffu, t < 2 ? fours[1] : fours[0], 2);
            if (t < 2) fours[1] = other;
            else fours[0] = other;
            const int column = 128 * unit + 32 * k + 16 * (t & 1) + 8 * (t >> 1);
#else
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const u32 word = word_of(found.codes[SPARSE ? 0 : k >> 1], 2 * (k & 1) + h);
                fours[h] = 0;
#pragma unroll
                for (int c = 0; c < 4; c++) {
                    const int nibble = 2 * (c >> 1) + half + 4 * (c & 1);
                    fours[h] |= (u64)narrow(scale * ((int)(word >> 4 * nibble & 15) - 8)) << 16 * c;
                }
            }
            const int column = 128 * unit + 32 * k + 8 * t;
#endif
            const int row = 16 * blockIdx.x + g + 8 * half;
            if (row < rows && column < columns)
                *(ulonglong2*)(out + (long)row * columns + column) = make_ulonglong2(fours[0], fours[1]);
        }
    }
}
