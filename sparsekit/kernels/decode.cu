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
#define PITCH 136             // values from one token's inputs to the next one's: eight of them lie in different banks

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

// sum += A B with A 16x32, 2:4, or sum = A B the first time; HALF says which two lanes of four hold its metadata.
template <int HALF>
static __device__ __forceinline__ void multiply_sparse(
    float (&sum)[4], const u32 (&a)[4], const u32 (&b)[4], u32 meta, bool first) {
    asm(MMA_SP " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9,%10,%11}, {%12,%13,%14,%15}, %16, %17;"
        : "=f"(sum[0]), "=f"(sum[1]), "=f"(sum[2]), "=f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]),
          "f"(first ? 0.0f : sum[0]), "f"(first ? 0.0f : sum[1]), "f"(first ? 0.0f : sum[2]),
          "f"(first ? 0.0f : sum[3]), "r"(meta), "n"(HALF));
}

// sum += A B with A 16x16, or sum = A B the first time.
static __device__ __forceinline__ void multiply_dense(float (&sum)[4], const u32 (&a)[4], u32 b0, u32 b1, bool first) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
        : "=f"(sum[0]), "=f"(sum[1]), "=f"(sum[2]), "=f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(first ? 0.0f : sum[0]),
          "f"(first ? 0.0f : sum[1]), "f"(first ? 0.0f : sum[2]), "f"(first ? 0.0f : sum[3]));
}

// 32 inputs of 8 tokens as the tensor cores want them; a lane says where a token's eight inputs are.
static __device__ __forceinline__ void operand(u32 (&b)[4], const u16* eight) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
                 : "r"(shared_address(eight)));
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
        for (int q = 0; q < 4 / GROUPS; q++) {
            const int k = s * (4 / GROUPS) + q;  // which 32 inputs of the unit
            u32 a[4];
#if SPARSE
            widen(word_of(weights.codes[0], k), a);
            const u32 meta = k < 2 ? weights.meta.x : weights.meta.y;
#pragma unroll
            for (int n = 0; n < NT; n++) {
                if (k & 1) multiply_sparse<1>(part[n], a, b[k][n], meta, q == 0);
                else multiply_sparse<0>(part[n], a, b[k][n], meta, q == 0);
            }
#else
#pragma unroll
            for (int h = 0; h < 2; h++) {
                widen(word_of(weights.codes[SPARSE ? 0 : k >> 1], 2 * (k & 1) + h), a);
#pragma unroll
                for (int n = 0; n < NT; n++)
                    multiply_dense(part[n], a, b[k][n][2 * h], b[k][n][2 * h + 1], q + h == 0);
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

// Units of one turn for all rows of a block, and their inputs.
struct Stage {
    u32 weights[MT * WR][UNIT];
    u16 inputs[TOKENS][PITCH];
};

// What a block shares: stages on their way, then the sums of its warps; see `Setting.shared_bytes`.
union Shared {
    Stage stages[WK][STAGES];
    float parts[WK][TOKENS][ROWS];
};
extern __shared__ uint4 pool[];

#if SPLIT > 1
#define CLUSTER __cluster_dims__(SPLIT, 1, 1)
#else
#define CLUSTER
#endif

// Begin to copy 16 bytes to shared memory, past the L1 cache; without `real` they become 0.
static __device__ __forceinline__ void copy(void* to, const void* from, bool real) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
                 "r"(real ? 16 : 0) : "memory");
}

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

// Each cluster has ROWS rows for itself; the warps along the inputs, of all its blocks, take turns at the units. Rows
// that the last cluster has too many are zeros, and their results are dropped.
extern "C" __global__ void CLUSTER __launch_bounds__(THREADS, BLOCKS) decode(
    const u32* __restrict__ weights, const u16* __restrict__ x, u16* __restrict__ y, int rows, int units, int tokens,
    int columns) {
    Shared& shared = *(Shared*)pool;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, wr = warp % WR, wk = warp / WR;
    const int part = blockIdx.x % SPLIT, cluster = blockIdx.x / SPLIT, turns = SPLIT * WK, turn = part * WK + wk;
    const int tiles = (rows + 15) / 16, first = cluster * WR * MT, here = min(WR * MT, tiles - first);  // tiles of rows
    const int thread = 32 * wr + lane;  // of those with the same inputs

    float sums[MT][NT][4];
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) sums[m][n][i] = 0.0f;

    // Units to come are on their way while one is computed.
    const int token = thread / 16, column = thread % 16 * 8;
    int coming = turn, place = 0;  // the next unit to fetch, and the stage for it
    const u32* weights_coming = weights + ((long)turn * tiles + first) * UNIT;
    const u16* inputs_coming = x + (long)token * columns + 128 * turn + column;
    const auto fetch = [&] {
        if (coming < units) {
            Stage& stage = shared.stages[wk][place];
#pragma unroll
            for (int at = 4 * thread; at < MT * WR * UNIT; at += 128 * WR)
                copy(stage.weights[0] + at, weights_coming + at, at < UNIT * here);
#pragma unroll
            for (int at = 0; at < TOKENS; at += 2 * WR) {
                const bool real = at + token < tokens && 128 * coming + column < columns;
                if (at + token < TOKENS) copy(stage.inputs[at + token] + column, inputs_coming + (long)at * columns, real);
            }
        }
        asm volatile("cp.async.commit_group;");
        coming += turns, weights_coming += (long)turns * tiles * UNIT, inputs_coming += 128 * turns;
        if (++place == STAGES) place = 0;
    };
#pragma unroll
    for (int stage = 0; stage < STAGES - 1; stage++) fetch();
    int at = 0;
    for (int unit = turn; unit < units; unit += turns) {
        asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
        if (WR == 1) __syncwarp();
        else asm volatile("bar.sync %0, %1;" ::"r"(1 + wk), "n"(32 * WR) : "memory");
        fetch();
        const Stage& stage = shared.stages[wk][at];
        u32 b[4][NT][4];
#pragma unroll
        for (int k = 0; k < 4; k++)
#pragma unroll
            for (int n = 0; n < NT; n++) operand(b[k][n], stage.inputs[8 * n + (lane & 7)] + 32 * k + 8 * (lane >> 3));
#pragma unroll
        for (int m = 0; m < MT; m++) accumulate(sums[m], part_of(stage.weights[wr * MT + m], lane), b);
        if (++at == STAGES) at = 0;
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncthreads();  // what has come makes room for the sums

#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int token = 8 * n + 2 * (lane & 3) + (i & 1), row = 16 * (wr * MT + m) + (lane >> 2) + 8 * (i >> 1);
                if (token < tokens) shared.parts[wk][token][row] = sums[m][n][i];
            }
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

// Exchange with the lane whose number differs in one bit: who has the bit gives its first value for the other's second.
template <class T>
static __device__ __forceinline__ void swap(T& one, T& two, bool has, int bit) {
    const T other = __shfl_xor_sync(0xffffffffu, has ? one : two, bit);
    if (has) one = other;
    else two = other;
}

// The weight in full, [rows, columns], from one warp a unit; grid (tiles of 16 rows, units / warps of a block).
extern "C" __global__ void __launch_bounds__(THREADS) expand(
    const u32* __restrict__ weights, u16* __restrict__ out, int rows, int units, int columns) {
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    const int unit = blockIdx.y * (WR * WK) + (threadIdx.x >> 5);
    if (unit >= units) return;
    const Loaded found = part_of(weights + ((long)unit * gridDim.x + blockIdx.x) * UNIT, lane);
#pragma unroll
    for (int k = 0; k < 4; k++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {  // rows g and g + 8
            const float scale = half_to_float((u16)(found.scales[k * GROUPS / 4] >> 16 * half));
#if SPARSE
            u64 fours[2];  // the tensor core's groups t and t + 4 of four inputs
            const u32 word = word_of(found.codes[0], k), mine = k < 2 ? found.meta.x : found.meta.y;
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const u32 meta = __shfl_sync(0xffffffffu, mine, 4 * g + 2 * (k & 1) + j) >> (16 * half + 4 * t);
                const int nibble = 2 * j + half;
                const u64 one = narrow(scale * ((int)(word >> 4 * nibble & 15) - 8));
                const u64 two = narrow(scale * ((int)(word >> (4 * nibble + 16) & 15) - 8));
                fours[j] = one << 16 * (meta & 3) | two << 16 * (meta >> 2 & 3);
            }
            swap(fours[0], fours[1], t & 1, 1);  // now two neighbours
            const int column = 128 * unit + 32 * k + 16 * (t & 1) + 8 * (t >> 1);
#else
            u32 twos[4];  // inputs 2 t and 2 t + 1 of every eight
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const u32 word = word_of(found.codes[SPARSE ? 0 : k >> 1], 2 * (k & 1) + i / 2);
                const int nibble = 2 * (i & 1) + half;
                const u32 one = narrow(scale * ((int)(word >> 4 * nibble & 15) - 8));
                twos[i] = one | (u32)narrow(scale * ((int)(word >> (4 * nibble + 16) & 15) - 8)) << 16;
            }
            swap(twos[0], twos[1], t & 1, 1), swap(twos[2], twos[3], t & 1, 1);
            swap(twos[0], twos[2], t & 2, 2), swap(twos[1], twos[3], t & 2, 2);
            const u64 fours[2] = {twos[0] | (u64)twos[1] << 32, twos[2] | (u64)twos[3] << 32};
            const int column = 128 * unit + 32 * k + 8 * t;
#endif
            const int row = 16 * blockIdx.x + g + 8 * half;
            if (row < rows && column < columns)
                *(ulonglong2*)(out + (long)row * columns + column) = make_ulonglong2(fours[0], fours[1]);
        }
    }
}
